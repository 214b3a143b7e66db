"""How an LM of a run is read: everyone's states, items' cards, and what texts or a domain model add to them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bdlm_jax.domain.arm import DomainArm
from bdlm_jax.evaluation import scorers
from bdlm_jax.evaluation.evaluate import CatalogueScorer
from bdlm_jax.lm.packing import Packed
from bdlm_jax.lm.text_head import TextHead
from bdlm_jax.mutual.options import Meeting
from bdlm_jax.run import build, rows
from bdlm_jax.run.build import DOT_ARM, Run
from bdlm_jax.runtime.log import heed
from bdlm_jax.types import Params


class Reader(NamedTuple):
    """How the LM's states are read: how the arms meet, everyone's prompt, and every item's card (or None)."""

    arm: DomainArm
    meeting: Meeting
    users: Packed
    cards: Packed | None = None
    texts: TextHead | None = None
    histories: Sequence[np.ndarray] = ()  # of everyone, where texts are read
    beside: Any = None  # `teachers.Beside`: the domain model that teaches beside the LM

    def read(self, run: Run, params: Params, packed: Packed) -> dict[str, np.ndarray]:
        sizes = {"n_users": run.data.n_users, "n_items": run.data.n_items, "batch_rows": run.config.lm.batch_rows}
        return scorers.read_states(params, packed, arm=self.arm, meeting=self.meeting, heed=heeding(run), **sizes)

    def scorer(self, run: Run, params: Params) -> CatalogueScorer:
        """The LM arm as a scorer: one forward pass a user."""
        states = self.read(run, params, self.users)
        return scorers.state_scorer(*self.widen(states))

    def view(self, run: Run, params: Params) -> Params:
        """What the domain arm learns from."""
        cards = self.read(run, params, self.cards) if self.cards else None
        states = self.read(run, params, self.users)
        view, pair = scorers.lm_view(params, states, cards), self.widen(states)
        return view | dict(zip(("state_user", "rows_item"), self.beside.widen(*pair) if self.beside else pair))

    def widen(self, states: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The LM's states and rows, with what texts add to their products."""
        pair = states["user"], states["rows_item"]
        return self.texts.widen(*pair, self.histories) if self.texts else pair


def ids_reader(run: Run, part: str) -> Reader:
    """Reads the ids-only LM."""
    users = rows.reading_rows(run, kind="ids", part=part)
    return Reader(DOT_ARM, Meeting(run.lm), users)


def bdlm_reader(run: Run, part: str, *, behind: int = 0, texts: TextHead | None = None) -> Reader:
    """Reads BDLM's LM, whose id rows are always those of the training interactions; `behind` as in `reading_rows`."""
    c = run.config
    users = rows.reading_rows(run, kind=c.prompts.kind, part=part, behind=behind)
    meeting = build.make_meeting(run, reads=c.mutual.reads)
    read = rows.known_histories(run, part, behind=behind) if texts else ()
    return Reader(build.make_arm(run, c.domain.model), meeting, users, rows.card_rows(run), texts, read)


def heeding(run: Run) -> Callable:
    """Goes through work that nobody saves, and leaves it where a stop is requested.

    Several processes leave together, between phases: the signal may have come to one of them alone.
    """
    return functools.partial(heed, run.stop) if jax.process_count() == 1 else iter
