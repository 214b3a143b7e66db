"""Matrix factorisation: the shared rows themselves, scored by the inner product."""

from bdlm_jax.domain.arm import DomainArm, dot_score


def mf_arm() -> DomainArm:
    """Returns matrix factorisation as a domain arm; it owns no parameters. Source: Rendle et al. 2009, section 5.2."""
    return DomainArm(
        init=lambda key: {}, encode=lambda shared, domain: (shared["user"], shared["item"]), score=dot_score
    )
