"""LightGCN: the shared rows propagated over the interaction graph, averaged over the layers."""

import jax.numpy as jnp

from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.domain.graph import make_graph, make_propagate
from bdlm_jax.runtime import sharding
from bdlm_jax.types import InputError

LAYER_WEIGHTS = ("uniform", "learned")


def lightgcn_arm(
    inputs: Inputs, *, n_layers: int = 3, layer_weights: str = "uniform", backend: str = "auto"
) -> DomainArm:
    """Makes LightGCN: E⁰ = shared rows, Eᵏ⁺¹ = Â·Eᵏ, e = Σ_k α_k·Eᵏ, score = e_u·e_i.

    Weights are α_k = 1/(n_layers + 1), where "learned" ones start, kept in domain["layer_weights"]. Source: He et al.
    2020 (LightGCN), equations 3, 4 and 7; the learned weights are ours.
    """
    if layer_weights not in LAYER_WEIGHTS:
        raise InputError(f"layer_weights {layer_weights!r} is unknown: choose one of {', '.join(LAYER_WEIGHTS)}.")
    sizes = {"n_users": inputs.n_users, "n_items": inputs.n_items}
    propagate = make_propagate(make_graph(inputs.user_E, inputs.item_E, **sizes), **sizes, backend=backend)
    uniform = 1.0 / (n_layers + 1)

    def init(key):
        del key
        return {} if layer_weights == "uniform" else {"layer_weights": jnp.full((n_layers + 1,), uniform)}

    def encode(shared, domain):
        weights = [uniform] * (n_layers + 1) if layer_weights == "uniform" else domain["layer_weights"]
        user, item = (sharding.pad_rows(shared[name]) for name in ("user", "item"))
        user_UD, item_ID = weights[0] * user, weights[0] * item
        for layer in range(1, n_layers + 1):
            user, item = propagate(user, item)
            user_UD, item_ID = user_UD + weights[layer] * user, item_ID + weights[layer] * item
        return user_UD[: len(shared["user"])], item_ID[: len(shared["item"])]

    return DomainArm(init=init, encode=encode)
