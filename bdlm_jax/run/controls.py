"""BDLM's controls: each is one switch away from it, at equal epochs and with the same choice on validation.

What remains when an ingredient is taken out is what the others were worth. `bdlm_warm` and `bdlm_text` take out more,
one after the other: between `ids_lm` and BDLM they are the steps of a ladder.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

NO_LM_TERMS = {f"mutual.lm.{term}": 0.0 for term in ("align_user", "align_item", "kl")}
DEAF_LM = NO_LM_TERMS | {"mutual.taught.kl": 0.0}
DEAF_DOMAIN = {f"mutual.domain.{term}": 0.0 for term in ("align_user", "align_item", "kl")}
UNALIGNED = {f"mutual.{arm}.{term}": 0.0 for arm in ("lm", "domain") for term in ("align_user", "align_item")}
NO_ROUNDS = {"mutual.domain_epochs_a_round": 0}  # the LM's phases, and with them the choice among them, stay
NO_LESSONS = {"mutual.taught.domain_epochs": 0, "mutual.teacher": "lm"}  # the LM's epochs in them stay
NO_TEXT = {
    "mutual.lm.text": 0.0, "prompts.kind": "ids", "prompts.titled_share": 0.0, "prompts.card_copies": 0.0,
    "pretrain.replay_share": 0.0, "mutual.text_head": "none",
}  # fmt: skip


class Control(NamedTuple):
    """What a control asks, and the settings that make it of BDLM's own."""

    asks: str
    settings: Callable[[ConfigDict], dict[str, Any]]


def _start(config: ConfigDict) -> dict[str, Any]:
    """The LM starts from what BDLM's reads at first, and the graph takes no further part in it."""
    read = config.mutual.reads == "propagated" and config.shared.initial == "domain"
    return {"mutual.reads": "layer0"} | ({"shared.initial": "propagated"} if read else {})


def _warm_taught(config: ConfigDict) -> dict[str, Any]:
    """A head that reads the texts goes with them; that of the graph stays, as lessons and teacher do."""
    head = {"mutual.text_head": "graph" if config.mutual.text_head == "graph" else "none"}
    return NO_TEXT | head | NO_LM_TERMS | UNALIGNED | NO_ROUNDS | _start(config)


def _rounds(number: int, config: ConfigDict) -> dict[str, Any]:
    m = config.mutual
    if not number or not m.rounds:
        return NO_ROUNDS
    times = m.rounds / number
    return {
        "mutual.rounds": number,
        "mutual.lm_epochs_a_round": m.lm_epochs_a_round * times,
        "mutual.domain_epochs_a_round": m.domain_epochs_a_round and max(1, round(m.domain_epochs_a_round * times)),
    }


def _on(model: str, config: ConfigDict) -> dict[str, Any]:
    rates = {f"mutual.{phase}_learning_rate": config[model].learning_rate for phase in ("domain", "distill")}
    return {"domain.model": model} | rates


def _fixed(settings: dict[str, Any]) -> Callable[[ConfigDict], dict[str, Any]]:
    return lambda config: settings


CONTROLS = {
    "bdlm_warm": Control(
        "is it only the warm start? ids_lm, its items started from the domain model; a domain arm distilled from it",
        lambda config: NO_TEXT | DEAF_LM | UNALIGNED | NO_ROUNDS | NO_LESSONS | _start(config),
    ),
    "bdlm_text": Control(
        "is it only the text? the warm start and the items' text, no mutual term for the LM",
        lambda config: DEAF_LM | UNALIGNED | NO_ROUNDS | NO_LESSONS | _start(config),
    ),
    "bdlm_warm_taught": Control(
        "what are texts, rounds and their terms worth? the warm start, then head, lessons and teacher as BDLM has them",
        _warm_taught,
    ),
    "bdlm_headless": Control("no likeness of items in the LM's scores", _fixed({"mutual.text_head": "none"})),
    "bdlm_unglossed": Control("what the LM says of unfamiliar words: titles alone", _fixed({"prompts.gloss": ""})),
    "bdlm_lm_teaches": Control(
        "does either know what the other does not? the LM alone teaches both arms", _fixed({"mutual.teacher": "lm"})
    ),
    "bdlm_domain_teaches": Control(
        "… the domain model, as it was alone, teaches both arms", _fixed({"mutual.teacher": "domain"})
    ),
    "bdlm_to_lm": Control("one-way teaching: domain → LM alone", _fixed(DEAF_DOMAIN)),
    # Without the LM's own alignment nothing fits the projection of its states: the score-level term is what teaches.
    "bdlm_to_domain": Control("one-way teaching: LM → domain alone", _fixed(DEAF_LM | UNALIGNED)),
    "bdlm_rounds_0": Control("do rounds teach? none, at equal epochs of the LM", lambda config: _rounds(0, config)),
    "bdlm_rounds_1": Control("do rounds teach? one, at equal epochs", lambda config: _rounds(1, config)),
    "bdlm_rounds_3": Control("do rounds teach? three, at equal epochs", lambda config: _rounds(3, config)),
    "bdlm_by_lm": Control("the shared table trained by the LM alone", _fixed({"shared.trained_by": "lm"})),
    "bdlm_by_domain": Control(
        "the shared table trained by the domain arm alone", _fixed({"shared.trained_by": "domain"})
    ),
    "bdlm_by_none": Control("the shared table frozen", _fixed({"shared.trained_by": "none"})),
    "bdlm_mse": Control("alignment by mean squared error", _fixed({"mutual.align": "mse"})),
    "bdlm_cosine": Control("alignment by cosine", _fixed({"mutual.align": "cosine"})),
    "bdlm_infonce": Control("alignment by InfoNCE", _fixed({"mutual.align": "infonce"})),
    "bdlm_unaligned": Control("no alignment of representations", _fixed(UNALIGNED)),
    "bdlm_random": Control(
        "the id rows start at random, not from the domain model", _fixed({"shared.initial": "random"})
    ),
    "bdlm_on_mf": Control("the domain model is MF", _fixed({"domain.model": "mf"})),
    "bdlm_on_lightgcn": Control("the domain model is LightGCN", _fixed({"domain.model": "lightgcn"})),
    "bdlm_on_sasrec": Control(
        "the domain model is SASRec, at the learning rate that it has alone", lambda config: _on("sasrec", config)
    ),
    "bdlm_on_itemgcn": Control(
        "the domain model is ItemGCN, at the learning rate that it has alone", lambda config: _on("itemgcn", config)
    ),
}
UNLIFTED = "_unlifted"  # behind a model's name: its cold items as they were trained (lifts.py)
ANSWERS = {word: control.asks for word, control in CONTROLS.items()} | {
    "ids_lm_distilled": "is it only the distillation? ids_lm's scores distilled into the domain model, nothing mutual",
    "cached": "is the domain arm more than a cache? BDLM's LM states, read 1, 2 and 5 items ago, with no training",
    "pool": "is anything left to teach? the two arms' scores summed, the weight chosen on validation",
    UNLIFTED.lstrip("_"): "what are cold items' moved rows worth? the same model with its rows as they were trained",
    "pool_alone": "is there anything to teach? the domain model alone and ids_lm, summed likewise",
}
