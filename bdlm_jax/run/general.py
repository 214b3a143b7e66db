"""The general text that keeps an own language model's language: what is replayed, and what its perplexity is read on.

With `pretrain.corpus` it is that text, of which a share is held out. Without, it is what the model itself writes, drawn
from its own distribution: to learn its own samples is to stay where it is, and its perplexity on those held out rises
by the exponential of the divergence from its first weights. (A model's samples in place of its data: Liu et al. 2023,
LLM-QAT, section 2.1.)
"""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bdlm_jax.evaluation.perplexity import perplexity
from bdlm_jax.lm import generate, lora, packing
from bdlm_jax.lm.packing import Packed
from bdlm_jax.lm.vocabulary import count_tokens
from bdlm_jax.run import rows
from bdlm_jax.run.build import Decoder, Run
from bdlm_jax.run.prepare import tokenizer_folder
from bdlm_jax.runtime.files import load_safetensors, save_safetensors
from bdlm_jax.runtime.log import progress
from bdlm_jax.types import Params

_LOG = logging.getLogger(__name__)
WARN_ABOVE = 0.1  # growth of the perplexity
_HELD_OUT = 8  # one of so many samples
_MOST_ROWS = 256  # that the perplexity is read on


class General(NamedTuple):
    """Rows of general text; `source` is for people, and None stands for no such text."""

    source: str
    replay: Packed | None
    held_out: Packed | None


def general_text(run: Run, decoder: Decoder) -> General:
    """Returns the general text of a run; without `lm.path` it is the corpus, of which nothing is held out."""
    length, vocabulary = run.config.prompts.length, run.texts.vocabulary
    if run.data.corpus or not run.config.lm.path:
        held_out = rows.text_rows(run.data.held_out, vocabulary, length) if run.data.held_out else None
        return General("the corpus", rows.corpus_rows(run), _first(held_out))
    samples = own_samples(run, decoder)
    if stays(run.config):  # text alone reaches nothing that moves
        held_out, replay = samples, []
    else:
        held_out = samples[::_HELD_OUT]
        replay = [text for number, text in enumerate(samples) if number % _HELD_OUT]
    packed = (packing.pack_documents(some, length, pad=vocabulary.pad) if some else None for some in (replay, held_out))
    return General("the model's own samples", *packed)


def spoken(run: Run, text: General, lm: Params) -> dict[str, float]:
    """Reads {"perplexity"} of what speaks, as `lm.speaks` says, on what is held out; nothing where nothing is."""
    if text.held_out is None:
        return {}
    return {"perplexity": _perplexity(run, text, lora.without(lm) if run.config.lm.speaks == "base" else lm)}


def stays(config: ml_collections.ConfigDict) -> bool:
    """Says whether what writes plain text is the model as it came."""
    return config.lm.trains == "bridge" or config.lm.speaks == "base"


def own_samples(run: Run, decoder: Decoder) -> list[np.ndarray]:
    """Returns `pretrain.samples` texts that the model writes, <bos> and <eos> included; drawn once a run directory.

    A model that stays as it came needs those alone that its perplexity is read on. Temperature 1 and every text token:
    its own distribution. Behind a <bos> of ours, which the model never saw, the first token is drawn evenly.
    """
    path = run.root / "data" / "samples.safetensors"
    if not path.exists() and run.config.pretrain.samples:
        _LOG.info("the language model writes texts of its own, to keep its language by")
        save_safetensors(path, {"tokens": _draw(run, decoder.params)})
    if not path.exists():
        return []
    tokens_NL, pad = load_safetensors(path)["tokens"], run.texts.vocabulary.pad
    return [row_L[: np.argmax(np.append(row_L, pad) == pad)] for row_L in tokens_NL]


def measure(run: Run, decoder: Decoder, lm: Params) -> dict | None:
    """Reads the perplexity of an own model on general text held out, before BDLM and after it, and says what it finds.

    Returns:
        {"text", "tokens", "before", "after"}, with `lm.speaks` base also "adapters": what it would be with the adapters
        left on; or None where there is no such model or text.
    """
    if not run.config.lm.path or (text := general_text(run, decoder)).held_out is None:
        return None
    before, after = (spoken(run, text, params)["perplexity"] for params in (decoder.params, lm))
    growth = after / before - 1
    n = int((text.held_out.text_target >= 0).sum())
    words = (text.source, n, before, after, 100 * growth)
    _LOG.info("perplexity on %s held out (%d tokens): %.2f before BDLM, %.2f after it (%+.1f %%)", *words)
    if growth > WARN_ABOVE:
        _LOG.warning(
            "the language model lost language: its perplexity on %s rose by %.0f %%; raise pretrain.replay_share or "
            "mutual.lm.text, lower lm.learning_rate, or let lm.trains be bridge.", text.source, 100 * growth,
        )  # fmt: skip
    told = {"text": text.source, "tokens": n, "before": before, "after": after}
    if run.config.lm.speaks == "base":
        told["adapters"] = _perplexity(run, text, lm)
        _LOG.info("with the adapters left on, which recommend and do not write, it would be %.2f", told["adapters"])
    return told


def own_tokens(run: Run) -> np.ndarray:
    """Returns (V,), True for what the model may write: text and <eos>, none of the other specials."""
    v = run.texts.vocabulary
    allowed_V = np.arange(run.lm.vocab_size) < len(v.tokenizer)
    allowed_V[[*v.tokenizer.all_special_ids, v.unnamed_user, v.unnamed_item]] = False
    allowed_V[v.eos] = True
    return allowed_V


def _perplexity(run: Run, text: General, lm: Params) -> float:
    return perplexity(lm, run.lm, text.held_out, batch_rows=run.config.lm.batch_rows)


def _draw(run: Run, params: Params) -> np.ndarray:
    v, n, length = run.texts.vocabulary, run.config.pretrain.samples, run.config.prompts.length
    n = -(-n // _HELD_OUT) if stays(run.config) else n
    allowed_V = own_tokens(run)
    start_NP = np.full((n, 1), v.bos, np.int32)
    if v.bos >= count_tokens(tokenizer_folder(run.config)):
        words = np.flatnonzero(allowed_V & (np.arange(len(allowed_V)) != v.eos))
        drawn_N = np.random.default_rng((run.config.seed, 11)).choice(words, n)
        start_NP = np.concatenate([start_NP, drawn_N[:, None].astype(np.int32)], axis=1)
    options = {"eos": v.eos, "pad": v.pad, "temperature": 1.0, "allowed_V": jnp.asarray(allowed_V)}
    made, params = [], lora.merge(params)
    size = 4 * run.config.lm.batch_rows  # writing holds no activations for a gradient
    for at in progress(range(0, n, size), description="general text"):
        start_BP = start_NP[np.minimum(np.arange(at, at + size), n - 1)]
        key = jax.random.fold_in(run.stage_key("general text"), at)
        mask_BP = np.ones_like(start_BP, bool)
        max_new = length - start_BP.shape[1]
        text_BT = generate.generate(params, run.lm, start_BP, mask_BP, max_new=max_new, key=key, **options)
        made.append(np.concatenate([start_BP, np.asarray(text_BT)], axis=1))
    return np.concatenate(made)[:n]


def _first(packed: Packed | None) -> Packed | None:
    return packed and Packed(*[getattr(packed, name)[:_MOST_ROWS] for name in packing.FIELDS])
