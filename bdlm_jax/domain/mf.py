"""Matrix factorisation: the shared rows themselves, scored by the inner product."""

from bdlm_jax.domain.arm import DomainArm, Inputs


def mf_arm(inputs: Inputs) -> DomainArm:
    """Returns matrix factorisation, which owns no parameters. Source: Rendle et al. 2009, section 5.2."""
    del inputs
    return DomainArm(init=lambda key: {}, encode=lambda shared, domain: (shared["user"], shared["item"]))
