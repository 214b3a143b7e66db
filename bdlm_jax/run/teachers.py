"""Who teaches the domain arm at length: the LM, and what texts and the domain model alone add, by validation."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bdlm_jax.evaluation import scorers
from bdlm_jax.lm.text_head import TextHead
from bdlm_jax.run import build, stages
from bdlm_jax.run.build import Run
from bdlm_jax.run.prepare import KNOWN
from bdlm_jax.runtime.files import write_json
from bdlm_jax.types import Params

TEXT_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # tried, of the text head's terms
TEACHER_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # tried, of the domain model beside the LM


class Beside(NamedTuple):
    """A domain model as it was alone, whose scores count with a weight beside those of the LM that teaches (ours)."""

    weight: float
    user_UD: np.ndarray
    item_ID: np.ndarray

    def widen(self, state_UM: np.ndarray, rows_IM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (U, M+D) and (I, M+D), whose products are the states' with the rows and the weighted scores."""
        pairs = (state_UM, self.weight * self.user_UD), (rows_IM, self.item_ID)
        return tuple(np.concatenate(pair, axis=1, dtype=np.float32) for pair in pairs)


def weigh_texts(run: Run, lm: Params) -> TextHead | None:
    """Chooses on validation how much the items' texts weigh beside the LM, where `mutual.text_head` reads them.

    One weight after the other, twice; what each pair reached is kept in text_head.json.
    """
    c = run.config.mutual
    if c.text_head == "none":
        return None
    content_IC = run.content_IC
    reader = stages.bdlm_reader(run, "validation", texts=TextHead(content_IC))
    states, reached = reader.read(run, lm, reader.users), {}

    def value(last: float, mean: float) -> float:
        if (last, mean) not in reached:
            head = TextHead(content_IC, last, mean)
            pair = head.widen(states["user"], states["rows_item"], reader.histories)
            reached[last, mean] = stages.validate(run, scorers.state_scorer(*pair))[run.config.select]
        return reached[last, mean]

    last = mean = 0.0
    for _ in range(2):
        last = max(TEXT_WEIGHTS, key=lambda weight: value(weight, mean))
        mean = max(TEXT_WEIGHTS, key=lambda weight: value(last, weight))
    tried = [{"last": a, "mean": b, run.config.select: reached[a, b]} for a, b in sorted(reached)]
    write_json(run.folder / "text_head.json", {"last": last, "mean": mean, "validation": tried})
    return TextHead(content_IC, last, mean)


def weigh_domain(run: Run, lm: Params, alone: Params, texts: TextHead | None) -> float | None:
    """Chooses on validation how much the domain model alone weighs beside the LM, where `mutual.teacher` is "pool".

    What each weight reached is kept in teacher.json: the best of them bounds what there is to teach.
    """
    if run.config.mutual.teacher == "lm":
        return None
    reader, reached = stages.bdlm_reader(run, "validation", texts=texts), {}
    pair, beside = reader.widen(reader.read(run, lm, reader.users)), _beside(run, alone, 0.0, "validation")
    for weight in TEACHER_WEIGHTS:
        scorer = scorers.state_scorer(*beside._replace(weight=weight).widen(*pair))
        reached[weight] = stages.validate(run, scorer)[run.config.select]
    weight = max(TEACHER_WEIGHTS, key=reached.get)
    write_json(run.folder / "teacher.json", {"weight": weight, "validation": {str(w): v for w, v in reached.items()}})
    return weight


def read_teacher(
    run: Run, part: str, *, texts: TextHead | None, alone: Callable[[Run], Params], weight: float | None
) -> stages.Reader:
    """Reads BDLM's LM as a teacher; `alone` gives the domain model that stands beside it with a weight, if any."""
    reader = stages.bdlm_reader(run, part, texts=texts)
    return reader if weight is None else reader._replace(beside=_beside(run, alone(run), weight, part))


def _beside(run: Run, alone: Params, weight: float, part: str) -> Beside:
    parts = KNOWN["validation"] if part == "validation" else build.parts_at_test(run.config)
    view = scorers.domain_view(build.make_arm(run, run.config.domain.model, parts=parts), alone)
    return Beside(weight, np.asarray(view["user"]), np.asarray(view["item"]))
