"""SASRec: a small causal transformer over the shared item rows; a user is the state after their history.

Rows are padded on the right: a causal state never looks at what stands after it, so padding needs no mask.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.domain.arm import DomainArm, dot_score
from bdlm_jax.types import Array, InputError, Params

PAD = -1


def sasrec_arm(history_UL: Array, *, width: int, n_layers: int = 2, n_heads: int = 2, chunk: int = 512) -> DomainArm:
    """Makes SASRec over fixed histories; score = state_u · shared item row.

    Its `encode` reads the whole history, so training triples must take `user_before`: the state just before the
    positive's place in the history, or the empty history's where the positive is older than the window.

    Args:
      history_UL: (U, L) item indices in time order from the left, -1 after the end; `recent_history` builds it.
      width: D of the shared rows.
      n_layers: transformer blocks.
      n_heads: heads, a divisor of `width`.
      chunk: users encoded at a time; bounds memory at chunk · L · D and chunk · heads · L².

    Returns:
      A DomainArm; shared["user"] takes no part. Source: Kang and McAuley 2018, section III, with pre-normalisation, a
      learned start token and without dropout (ours).

    Raises:
      InputError: n_heads does not divide width, or an item stands after padding.
    """
    history = np.asarray(history_UL, np.int32)
    if width % n_heads:
        raise InputError(f"sasrec's width {width} is no multiple of its {n_heads} heads: change one of them.")
    if np.any((history[:, 1:] >= 0) & (history[:, :-1] < 0)):
        raise InputError("history_UL has an item after padding: fill rows from the left, with -1 after the end.")
    history_UL = jnp.asarray(history)

    def init(key):
        return init_sasrec(key, width=width, length=history.shape[1], n_layers=n_layers)

    def states(shared, domain, history_BL):
        return sasrec_states(domain, jnp.asarray(shared["item"]), history_BL, n_heads=n_heads)

    def encode(shared, domain):
        @jax.checkpoint
        def last_state(row_L):
            return states(shared, domain, row_L[None])[0, jnp.sum(row_L >= 0)]

        return jax.lax.map(last_state, history_UL, batch_size=chunk), shared["item"]

    def user_before(shared, domain, user_B, positive_B):
        history_BL = history_UL[user_B]
        here_BL = history_BL == positive_B[:, None]
        place_B = jnp.where(here_BL.any(axis=1), jnp.argmax(here_BL, axis=1), 0)
        return jnp.take_along_axis(states(shared, domain, history_BL), place_B[:, None, None], axis=1)[:, 0]

    return DomainArm(init=init, encode=encode, score=dot_score, user_before=user_before)


def recent_history(indptr: Array, item: Array, *, length: int) -> np.ndarray:
    """Keeps each user's last `length` items: CSR rows in time order -> (U, length) int32, -1 after the end."""
    indptr, item = np.asarray(indptr), np.asarray(item)
    count_U = np.minimum(np.diff(indptr), length)
    rows_UL = np.full((count_U.size, length), PAD, np.int32)
    for user, count in enumerate(count_U):
        rows_UL[user, :count] = item[indptr[user + 1] - count : indptr[user + 1]]
    return rows_UL


def init_sasrec(key: Array, *, width: int, length: int, n_layers: int) -> Params:
    """Draws the transformer's parameters: kernels with standard deviation 1/√fan-in, positions and start 0.02."""
    keys = iter(jax.random.split(key, 2 + 6 * n_layers))

    def kernel():
        return jax.random.normal(next(keys), (width, width)) * width**-0.5

    def norm():
        return {"scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}

    start_D = 0.02 * jax.random.normal(next(keys), (width,))
    position = 0.02 * jax.random.normal(next(keys), (length + 1, width))
    blocks = [
        {
            "attention_norm": norm(),
            **{name: kernel() for name in ("query", "key", "value", "out")},
            "mlp_norm": norm(),
            "up": {"kernel": kernel(), "bias": jnp.zeros((width,))},
            "down": {"kernel": kernel(), "bias": jnp.zeros((width,))},
        }
        for _ in range(n_layers)
    ]
    return {"start": start_D, "position": position, "blocks": blocks, "final_norm": norm()}


def sasrec_states(domain: Params, item_ID: Array, history_BL: Array, *, n_heads: int) -> Array:
    """Returns (B, L+1, D): state t has read the first t items of the row, so it is what predicts item t."""
    n_rows, length = history_BL.shape
    width = item_ID.shape[1]
    # An item row of LightGCN's scale (0.1) would drown in the positions; √D is the transformer's own remedy.
    item_BLD = item_ID[jnp.maximum(history_BL, 0)] * width**0.5
    start_B1D = jnp.broadcast_to(domain["start"], (n_rows, 1, width))
    x = jnp.concatenate([start_B1D, item_BLD], axis=1) + domain["position"][: length + 1]
    for block in domain["blocks"]:
        y = _layer_norm(x, block["attention_norm"])
        heads = [(y @ block[name]).reshape(n_rows, length + 1, n_heads, -1) for name in ("query", "key", "value")]
        x = x + jax.nn.dot_product_attention(*heads, is_causal=True).reshape(x.shape) @ block["out"]
        y = _layer_norm(x, block["mlp_norm"])
        y = jax.nn.relu(y @ block["up"]["kernel"] + block["up"]["bias"])
        x = x + y @ block["down"]["kernel"] + block["down"]["bias"]
    return _layer_norm(x, domain["final_norm"])


def _layer_norm(x, params):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]
