"""Neural collaborative filtering: an inner product with learned weights plus an MLP, both over the shared rows."""

import jax
import jax.numpy as jnp

from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.types import InputError


def ncf_arm(inputs: Inputs, *, hidden: tuple[int, ...] = (64, 32)) -> DomainArm:
    """Makes NeuMF over one embedding: score = Σ_d g_d·u_d·v_d + MLP([u; v]), relu between the layers.

    Both branches read the shared rows (the paper gives the MLP a second table; one table keeps everything that the
    model knows of a user where the LM can read it: ours). It starts as matrix factorisation: g = 1, last layer small.
    The first layer is split into a part of the user and a part of the item, so that scoring all pairs of (B, C) costs
    B + C products of its width; memory is B·C·hidden[0], so score a large catalogue in chunks. Source: He et al. 2017
    (NCF), equations 9 to 12.
    """
    if not hidden:
        raise InputError("ncf needs at least one hidden layer: give hidden=(64, 32), say.")
    width = inputs.width

    def init(key):
        sizes = (2 * width, *hidden, 1)
        keys = jax.random.split(key, len(sizes) - 1)
        layers = [
            {"kernel": jax.random.normal(k, (n, m)) * (2.0 / n) ** 0.5, "bias": jnp.zeros((m,))}
            for k, n, m in zip(keys, sizes[:-1], sizes[1:])
        ]
        layers[-1]["kernel"] = 0.1 * layers[-1]["kernel"]
        return {"gmf": jnp.ones((width,)), "mlp": layers}

    @jax.default_matmul_precision("highest")
    def score(domain, user_BD, item_CD):
        first, *rest = domain["mlp"]
        of_user_BH = user_BD @ first["kernel"][:width] + first["bias"]
        of_item_CH = item_CD @ first["kernel"][width:]
        hidden_BCH = of_user_BH[:, None] + of_item_CH[None]
        for layer in rest:
            hidden_BCH = jax.nn.relu(hidden_BCH) @ layer["kernel"] + layer["bias"]
        return (user_BD * domain["gmf"]) @ item_CD.T + hidden_BCH[..., 0]

    return DomainArm(init=init, encode=lambda shared, domain: (shared["user"], shared["item"]), score=score)
