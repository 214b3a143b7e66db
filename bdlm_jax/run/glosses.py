"""What the LM says of a title in words that no interaction has taught: its answer is read on the item's card.

What a language model knows of a rare word lies in what it says of it, and less in where the word's row or state lies: a
map from titles to items, learnt on known words, does not reach the others (docs/experiments.md). So the model is asked
in words, and its answer stands in the title's place. A recommender's items told by a language model: KAR, Xi et al.
2023; whom to ask, and that the model is the LM arm itself, is ours.
"""

import dataclasses
import logging

import jax.numpy as jnp
import numpy as np

from bdlm_jax.lm import lora
from bdlm_jax.lm.generate import generate
from bdlm_jax.run.build import Decoder, Run
from bdlm_jax.run.general import own_tokens
from bdlm_jax.runtime.files import read_json, write_json
from bdlm_jax.runtime.log import progress

_LOG = logging.getLogger(__name__)
TITLE = "{}"  # where the title stands in `prompts.gloss`


def with_glosses(run: Run, decoder: Decoder) -> Run:
    """Returns the run with glosses on the cards of unfamiliar items, where `prompts.gloss` asks for them.

    They are written once a run directory, to data/glosses.json. An empty one leaves the title where it is.
    """
    if not (asked := run.config.prompts.gloss):
        return run
    texts, told = run.texts, run.data.item_texts
    if not len(items := unfamiliar_items(texts.titles, run.warm_I)):
        return run
    path = run.root / "data" / "glosses.json"
    if not path.exists():
        _LOG.info("the language model is asked of %d items in words that no item with interactions has", len(items))
        said = write_glosses(run, decoder, [asked.replace(TITLE, told[item]) for item in items])
        write_json(path, {told[item]: gloss for item, gloss in zip(items, said)})
    glosses = read_json(path, remedy="delete it, and the run asks the language model again")
    cards, limit = list(texts.titles), run.config.prompts.max_title_tokens
    for item, tokens in zip(items, texts.vocabulary.encode_text([glosses.get(told[item], "") for item in items])):
        cards[item] = tokens[:limit] if len(tokens) else cards[item]
    return dataclasses.replace(run, texts=texts._replace(cards=cards))


def unfamiliar_items(titles: list[np.ndarray], warm_I: np.ndarray) -> np.ndarray:
    """Returns the items, in order, with a token in their title that no warm item's title has."""
    known = {token for title, warm in zip(titles, warm_I) if warm for token in title.tolist()}
    return np.flatnonzero([not known.issuperset(title.tolist()) for title in titles])


def write_glosses(run: Run, decoder: Decoder, questions: list[str]) -> list[str]:
    """Returns what the LM writes behind each question, greedily, with as many tokens as a title may have."""
    v, params, said = run.texts.vocabulary, lora.merge(decoder.params), []
    prompts = [np.append(np.int32(v.bos), tokens) for tokens in v.encode_text(questions)]
    longest, size = max(map(len, prompts)), 4 * run.config.lm.batch_rows
    options = {"max_new": run.config.prompts.max_title_tokens, "eos": v.eos, "pad": v.pad}
    for at in progress(range(0, len(prompts), size), description="glosses"):
        tokens_BL = np.full((size, longest), v.pad, np.int32)
        mask_BL = np.arange(longest) == 0  # rows beyond the last begin somewhere too
        mask_BL = np.repeat(mask_BL[None], size, axis=0)
        for row, prompt in enumerate(prompts[at : at + size]):
            tokens_BL[row, : len(prompt)], mask_BL[row, : len(prompt)] = prompt, True
        text_BT = generate(params, run.lm, tokens_BL, mask_BL, allowed_V=jnp.asarray(own_tokens(run)), **options)
        for text_T in np.asarray(text_BT)[: len(prompts) - at]:
            said.append(v.decode([token for token in text_T if token not in (v.pad, v.eos)]).strip())
    return said
