"""Text from a causal LM: free (greedy, temperature, top-p) and constrained to titles that exist or to items.

All shapes are static: one prefill, then one compiled loop over `decode_token`. A title is found by beam search over a
trie of title tokens, an item by the logits of its one token, so nothing that does not exist can come out.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.lm.causal_lm import text_logits
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.decoding import Cache, decode_token, prefill
from bdlm_jax.types import Array, InputError, Params


class Generated(NamedTuple):
    """What `generate` wrote.

    Args:
        tokens_BT: (B, T) text tokens, the end token included; `pad` behind it.
        length_B: (B,) tokens written, the end token included.
        log_likelihood_B: (B,) sum of log p(token) under the model itself (temperature 1, nothing cut or forbidden).
    """

    tokens_BT: Array
    length_B: Array
    log_likelihood_B: Array


class Trie(NamedTuple):
    """Sequences as a tree: node 0 is the root, edge e leads to node e + 1, edges are sorted by their parent.

    Args:
        first_N: (N,) first edge of each node.
        n_N: (N,) number of its edges; 0 at the end of a sequence.
        token_E: (E,) token of each edge, E = N - 1.
        sequence_N: (N,) the sequence that ends at a node, the first of equal ones; -1 at other nodes.
        slot_W: 0…W-1, W being the most edges of one node.
        step_T: 0…T-1, T being the length of the longest sequence.
    """

    first_N: Array
    n_N: Array
    token_E: Array
    sequence_N: Array
    slot_W: Array
    step_T: Array


class Titles(NamedTuple):
    """What `beam_titles` found, best first.

    Args:
        title_BK: (B, K) number of the sequence in the trie; -1 where there are fewer than K.
        tokens_BKT: (B, K, T) its tokens, the end token included; `pad` behind it.
        log_likelihood_BK: (B, K) as `continuation_log_likelihood` of the title and its end; -inf where there is none.
    """

    title_BK: Array
    tokens_BKT: Array
    log_likelihood_BK: Array


@partial(jax.jit, static_argnames=("config", "max_new", "greedy"))
def _generate(params, config, tokens_BL, mask_BL, key, temperature, top_p, eos, pad, allowed_V, id_rows_XM, *, max_new,
              greedy):  # fmt: skip
    n_rows, n_tokens = tokens_BL.shape
    hidden_BM, cache = prefill(params, config, tokens_BL, mask_BL, length=n_tokens + max_new, id_rows_XM=id_rows_XM)
    row_B = jnp.arange(n_rows)

    def body(carry):
        t, hidden_BM, cache, out, done_B = carry
        logits_BV = text_logits(params, config, hidden_BM)
        open_BV = logits_BV if allowed_V is None else jnp.where(allowed_V, logits_BV, -jnp.inf)
        if greedy:
            token_B = jnp.argmax(open_BV, axis=-1)
        else:
            # A key of each row's own: what a prompt gets does not hang on the size of its batch.
            key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, t), row_B)
            token_B = jax.vmap(jax.random.categorical)(key_B, keep_top_p(open_BV / temperature, top_p))
        said_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
        token_B = jnp.where(done_B, pad, token_B)
        out = Generated(
            out.tokens_BT.at[:, t].set(token_B),
            out.length_B + ~done_B,
            out.log_likelihood_B + jnp.where(done_B, 0.0, said_B),
        )
        done_B |= token_B == eos
        hidden_BM, cache = decode_token(params, config, token_B, cache, id_rows_XM=id_rows_XM)
        return t + 1, hidden_BM, cache, out, done_B

    empty = Generated(
        jnp.full((n_rows, max_new), pad, jnp.int32), jnp.zeros(n_rows, jnp.int32), jnp.zeros(n_rows, jnp.float32)
    )
    start = (jnp.asarray(0), hidden_BM, cache, empty, jnp.zeros(n_rows, bool))
    return jax.lax.while_loop(lambda carry: (carry[0] < max_new) & ~carry[4].all(), body, start)[3]


def generate(
    params: Params,
    config: LMConfig,
    tokens_BL: Array,
    mask_BL: Array,
    *,
    max_new: int,
    eos: int,
    pad: int,
    key: Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    allowed_V: Array | None = None,
    id_rows_XM: Array | None = None,
) -> Generated:
    """Writes text tokens behind prompts, until `eos` or `max_new`.

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        tokens_BL: (B, L) prompts, padded on either side; every prompt has at least one token.
        mask_BL: (B, L) bool, True at tokens.
        max_new: T, the most tokens written; each T compiles once.
        eos: the token that ends a text.
        pad: what stands behind it.
        key: a JAX key, needed where the temperature is above 0.
        temperature: divides the logits before drawing; 0 takes the likeliest token.
        top_p: draws among the fewest tokens whose probabilities reach this sum (Holtzman et al. 2020, section 3.1).
        allowed_V: (V,) bool, the tokens that may be written, at least one; None: all.
        id_rows_XM: (X, M) rows of the id tokens, where prompts hold some; they are read and never written.

    Returns:
        Generated.

    Raises:
        InputError: an option out of its range, or no key.
    """
    if not 0 <= temperature < np.inf:
        raise InputError(f"temperature is {temperature}, it must be 0 (the likeliest token) or above.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, it must be above 0 and at most 1.")
    if max_new < 1:
        raise InputError(f"max_new is {max_new}, at least one token must be asked for.")
    if key is None:
        if temperature > 0:
            raise InputError("a temperature above 0 draws tokens: give a key.")
        key = jax.random.key(0)
    return _generate(
        params, config, tokens_BL, mask_BL, key, temperature, top_p, eos, pad, allowed_V, id_rows_XM,
        max_new=max_new, greedy=temperature == 0,
    )  # fmt: skip


def keep_top_p(logits: Array, top_p: Array) -> Array:
    """Sets to -inf all but the fewest likeliest tokens whose probabilities reach `top_p`; equal ones stay together.

    Args:
        logits: (..., V).
        top_p: (), in (0, 1].

    Returns:
        (..., V).
    """
    sorted_logits = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(sorted_logits, axis=-1)
    # A token stays while those before it have not reached the sum: the likeliest always does.
    kept = jnp.cumsum(probability, axis=-1) - probability < top_p
    least = jnp.where(kept, sorted_logits, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def rank_items(hidden_BM: Array, rows_IM: Array, *, k: int, seen_BI: Array | None = None) -> tuple[Array, Array]:
    """Decodes one item token of the allowed ones: beam search over single tokens is the top of the restricted logits.

    Args:
        hidden_BM: (B, M) states after the prompts, such as `prefill`'s.
        rows_IM: (I, M) rows of the item tokens.
        k: how many, at most I.
        seen_BI: (B, I) bool, items that are not allowed; None: all are.

    Returns:
        (items (B, k), log-probabilities (B, k) among the allowed items), best first; -1 and -inf where fewer are left.
    """
    logits_BI = hidden_BM.astype(jnp.float32) @ rows_IM.T.astype(jnp.float32)
    if seen_BI is not None:
        logits_BI = jnp.where(seen_BI, -jnp.inf, logits_BI)
    best_BK, item_BK = jax.lax.top_k(logits_BI, k)
    found_BK = best_BK > -jnp.inf
    total_B1 = jax.nn.logsumexp(logits_BI, axis=-1, keepdims=True)
    return jnp.where(found_BK, item_BK, -1), jnp.where(found_BK, best_BK - total_B1, -jnp.inf)


def make_trie(titles: list[np.ndarray], *, eos: int) -> Trie:
    """Joins titles, each with `eos` behind it, to a tree.

    Args:
        titles: token arrays without the end token.
        eos: the end token; no title holds it.

    Returns:
        Trie, in NumPy; sequence s is titles[s], or the first title equal to it.

    Raises:
        InputError: no titles, or one with the end token in it.
    """
    if not len(titles):
        raise InputError("there are no titles to choose from: give at least one.")
    length_S = np.array([len(title) for title in titles], np.int64) + 1
    token_ST = np.full((len(titles), length_S.max()), eos, np.int64)
    for row, title in enumerate(titles):
        token_ST[row, : len(title)] = title
    if (bad := ((token_ST == eos) & (np.arange(token_ST.shape[1]) < length_S[:, None] - 1)).any(axis=1)).any():
        raise InputError(f"title {int(np.argmax(bad))} holds the end token {eos}: take it out.")
    node_S, n_nodes, parents, tokens = np.zeros(len(titles), np.int64), 1, [], []
    for t in range(token_ST.shape[1]):
        row = np.flatnonzero(length_S > t)
        edges, inverse = np.unique(np.stack([node_S[row], token_ST[row, t]], axis=1), axis=0, return_inverse=True)
        node_S[row] = n_nodes + inverse.reshape(-1)
        n_nodes += len(edges)
        parents.append(edges[:, 0])
        tokens.append(edges[:, 1])
    n_N = np.bincount(np.concatenate(parents), minlength=n_nodes)
    sequence_N = np.full(n_nodes, -1, np.int64)
    sequence_N[node_S[::-1]] = np.arange(len(titles))[::-1]
    return Trie(
        first_N=(np.cumsum(n_N) - n_N).astype(np.int32),
        n_N=n_N.astype(np.int32),
        token_E=np.concatenate(tokens).astype(np.int32),
        sequence_N=sequence_N.astype(np.int32),
        slot_W=np.arange(n_N.max(), dtype=np.int32),
        step_T=np.arange(token_ST.shape[1], dtype=np.int32),
    )


@partial(jax.jit, static_argnames=("config", "n_beams"))
def beam_titles(
    params: Params,
    config: LMConfig,
    tokens_BL: Array,
    mask_BL: Array,
    trie: Trie,
    *,
    n_beams: int = 1,
    pad: int,
    id_rows_XM: Array | None = None,
) -> Titles:
    """Finds titles that are likely behind prompts, by beam search over a trie: each result is a title that exists.

    The score is sum_t log p(token t | prompt, tokens before t), the end token included, with p over all V text tokens;
    with as many beams as titles the search is exhaustive, with one it is greedy (the search is ours).

    Args:
        params: the tree of `init_lm`.
        config: the decoder's shape.
        tokens_BL: (B, L) prompts, padded on either side; every prompt has at least one token.
        mask_BL: (B, L) bool, True at tokens.
        trie: of `make_trie`.
        n_beams: K.
        pad: stands behind a title's end.
        id_rows_XM: (X, M) rows of the id tokens, where prompts hold some.

    Returns:
        Titles, best first.
    """
    n_rows, n_tokens = tokens_BL.shape
    n_steps, n_slots = len(trie.step_T), len(trie.slot_W)
    hidden_BM, cache = prefill(params, config, tokens_BL, mask_BL, length=n_tokens + n_steps, id_rows_XM=id_rows_XM)
    cache = _rows_of(cache, jnp.repeat(jnp.arange(n_rows), n_beams))
    hidden_BKM = jnp.repeat(hidden_BM[:, None], n_beams, axis=1)
    # All beams start alike: one of them is enough.
    score_BK = jnp.where(jnp.arange(n_beams) == 0, 0.0, -jnp.inf) * jnp.ones((n_rows, 1))
    node_BK = jnp.zeros((n_rows, n_beams), jnp.int32)
    tokens_BKT = jnp.full((n_rows, n_beams, n_steps), pad, jnp.int32)

    def step(carry, t):
        hidden_BKM, cache, score_BK, node_BK, tokens_BKT = carry
        logp_BKV = jax.nn.log_softmax(text_logits(params, config, hidden_BKM))
        n_BK1 = trie.n_N[node_BK][..., None]
        edge_BKW = jnp.minimum(trie.first_N[node_BK][..., None] + trie.slot_W, len(trie.token_E) - 1)
        token_BKW = trie.token_E[edge_BKW]
        next_BKW = score_BK[..., None] + jnp.take_along_axis(logp_BKV, token_BKW, axis=-1)
        # A finished beam has one way on: to stay what it is.
        stays_BKW = (n_BK1 == 0) & (trie.slot_W == 0)
        next_BKW = jnp.where(trie.slot_W < n_BK1, next_BKW, jnp.where(stays_BKW, score_BK[..., None], -jnp.inf))
        score_BK, choice_BK = jax.lax.top_k(next_BKW.reshape(n_rows, -1), n_beams)
        from_BK = choice_BK // n_slots
        pick = lambda x_BKW: jnp.take_along_axis(x_BKW.reshape(n_rows, -1), choice_BK, axis=1)  # noqa: E731
        stayed_BK = pick(stays_BKW)
        token_BK = jnp.where(stayed_BK, pad, pick(token_BKW))
        node_BK = jnp.where(stayed_BK, jnp.take_along_axis(node_BK, from_BK, axis=1), pick(edge_BKW) + 1)
        tokens_BKT = jnp.take_along_axis(tokens_BKT, from_BK[..., None], axis=1).at[:, :, t].set(token_BK)
        cache = _rows_of(cache, (jnp.arange(n_rows)[:, None] * n_beams + from_BK).reshape(-1))
        hidden, cache = decode_token(params, config, token_BK.reshape(-1), cache, id_rows_XM=id_rows_XM)
        return (hidden.reshape(hidden_BKM.shape), cache, score_BK, node_BK, tokens_BKT), None

    start = (hidden_BKM, cache, score_BK, node_BK, tokens_BKT)
    (_, _, score_BK, node_BK, tokens_BKT), _ = jax.lax.scan(step, start, trie.step_T)
    found_BK = score_BK > -jnp.inf
    return Titles(
        jnp.where(found_BK, jnp.asarray(trie.sequence_N)[node_BK], -1),
        jnp.where(found_BK[..., None], tokens_BKT, pad),
        score_BK,
    )


def _rows_of(cache: Cache, row_R: Array) -> Cache:
    """The cache with its rows taken from elsewhere."""
    return cache._replace(
        k=cache.k[:, row_R],
        v=cache.v[:, row_R],
        position_BS=cache.position_BS[row_R],
        mask_BS=cache.mask_BS[row_R],
        next_B=cache.next_B[row_R],
    )
