"""What every model of a run ranks: the cases of a part that are judged, and candidates that are drawn once and kept."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections
import numpy as np

from bdlm_jax.data import candidates as candidate_files
from bdlm_jax.data.candidates import Candidates
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, Split
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)

PARTS = {"validation": VALIDATION, "test": TEST}
KNOWN = {"validation": (TRAIN,), "test": (TRAIN, VALIDATION)}  # what may be known when a part is predicted
MOST_SCORES = 10**10  # of a part that one model gives for its full ranking, unless `evaluate.cases` says otherwise
_PROTOCOLS = ("protocols", "text_protocols")  # settings of config.evaluate


def judged_cases(config: ml_collections.ConfigDict, split: Split, part: str) -> np.ndarray | None:
    """The numbers of a part's cases on which every model is judged, a fixed draw; None: all of them.

    By `evaluate.cases`: so many at most, 0 all, -1 as many as the catalogue allows for `MOST_SCORES` scores.
    """
    n_cases, most = split.counts()[part], config.evaluate.cases
    most = max(1, MOST_SCORES // split.interactions.n_items) if most < 0 else most or n_cases
    if n_cases <= most:
        return None
    return candidate_files.draw_cases(n_cases, most, seed=config.data.candidates_seed, part=PARTS[part])


def freeze(
    config: ml_collections.ConfigDict, folder: Path, split: Split, part: str, protocols: Mapping[str, int]
) -> dict[str, Candidates]:
    """Draws the candidates of a part and keeps them in `folder`, or reads those that an earlier start has drawn.

    `protocols` are {name: others beside each target} that `fillable` returned.
    """
    found, case_M = {}, judged_cases(config, split, part)
    for name, n in protocols.items():
        path = folder / f"{part}_{name}.npz"
        try:
            found[name] = candidate_files.load_candidates(path)
        except InputError as error:  # a damaged file: the same draw again, which the fingerprint holds to the first
            if path.exists():
                _LOG.warning("%s They are drawn again.", error)
            options = {"n_negatives": n, "seed": config.data.candidates_seed, "name": name, "case_M": case_M}
            made = candidate_files.make_candidates(split, PARTS[part], **options)
            candidate_files.save_candidates(path, made)
            found[name] = candidate_files.load_candidates(path)
        candidate_files.check_candidates(split, found[name])
        if part == "test" and (short := int((found[name].items_NC < 0).any(axis=1).sum())):
            told = "of %d cases rank fewer than the %d others of %s: their users have had nearly all items"
            _LOG.warning(f"%d {told}", short, len(found[name]), n, name)
    return found


def fillable(config: ml_collections.ConfigDict, split: Split) -> dict[str, int]:
    """The protocols of `data.candidates` that most test cases can fill: others would be shorter than their names say.

    Raises:
        InputError: one that is asked for cannot be filled, or no case has anything to rank.
    """
    n_items, case_M, (user_N, _) = split.interactions.n_items, judged_cases(config, split, "test"), split.cases(TEST)
    user_N = user_N if case_M is None else user_N[case_M]
    known_U, had_U = (_count_items(split, parts) for parts in (KNOWN["test"], (*KNOWN["test"], TEST)))
    if (known_U[user_N] >= n_items - 1).all():
        raise InputError(
            f"config.data.path: no test case has anything to rank beside its target, for its user has had all other "
            f"of the {n_items} items, and every model would find it; take data with more items."
        )
    left_N = n_items - had_U[user_N]  # what may be drawn
    short = {name: int((left_N < n).sum()) for name, n in config.data.candidates.items()}
    fits = {name for name, n_short in short.items() if 2 * n_short <= len(user_N)}
    for name in config.data.candidates:
        if name not in fits:
            _refuse_if_used(config, name, fits, short=f"{short[name]} of {len(user_N)} test cases", n_items=n_items)
    return {name: n for name, n in config.data.candidates.items() if name in fits}


def _count_items(split: Split, parts: Sequence[int]) -> np.ndarray:
    """(U,) how many items each user has had in some parts."""
    table = split.interactions
    return np.bincount(split.pairs(*parts) // table.n_items, minlength=table.n_users)


def _refuse_if_used(config, name: str, fits: set[str], *, short: str, n_items: int) -> None:
    e, select, n = config.evaluate, config.select.partition("/")[2], config.data.candidates[name]
    ranked_by_text = name == "cand20" and "text_lm" in config.models
    told = f"for {short} no {n} items are left that their users have not had: the data have {n_items}"
    if name in (*e.protocols, *e.text_protocols, select) or ranked_by_text:
        words = {key: tuple(p for p in e[key] if p in fits or p == "full") for key in _PROTOCOLS}
        remedy = " and ".join(f"config.evaluate.{key}={kept}" for key, kept in words.items())
        remedy += ", choose another config.select" if name == select else ""
        remedy += ", and take text_lm, which needs cand20, out of config.models" if ranked_by_text else ""
        raise InputError(f"config.data.candidates.{name} asks for {n} others beside each target; {told}. Set {remedy}.")
    _LOG.warning("candidates %s are left out; %s", name, told)
