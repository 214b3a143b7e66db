"""Who teaches the arms at length: the LM, and what likeness of items and the domain model alone add, by validation."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bdlm_jax.evaluation import scorers
from bdlm_jax.lm.text_head import TextHead
from bdlm_jax.run import build, reading, stages
from bdlm_jax.run.build import Decoder, Run
from bdlm_jax.run.ranked import KNOWN
from bdlm_jax.runtime.files import write_json
from bdlm_jax.runtime.fit import Fitted
from bdlm_jax.types import Params

TEXT_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # tried, of the text head's terms
TEACHER_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # tried, of the domain model beside the LM


class Beside(NamedTuple):
    """A domain model as it was alone, whose scores count with a weight beside those of the LM that teaches (ours).

    Of an infinite weight it teaches by itself.
    """

    weight: float
    user_UD: np.ndarray
    item_ID: np.ndarray

    def widen(self, state_UM: np.ndarray, rows_IM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (U, M+D) and (I, M+D), whose products are the states' with the rows and the weighted scores."""
        if np.isinf(self.weight):
            return self.user_UD, self.item_ID
        pairs = (state_UM, self.weight * self.user_UD), (rows_IM, self.item_ID)
        return tuple(np.concatenate(pair, axis=1, dtype=np.float32) for pair in pairs)


class Teacher(NamedTuple):
    """What teaches: BDLM's LM with its texts, and with a weight, if any, the domain model that `alone` gives."""

    texts: TextHead | None
    weight: float | None
    alone: Callable[[Run], Params]

    def read(self, run: Run, part: str) -> reading.Reader:
        """Reads it as it stands before a part."""
        reader = reading.bdlm_reader(run, part, texts=self.texts)
        if self.weight is None:
            return reader
        return reader._replace(beside=_beside(run, self.alone(run), self.weight, part))


def choose_teacher(run: Run, lm: Params, alone: Callable[[Run], Params], *, name: str = "teacher.json") -> Teacher:
    """Makes the teacher of which the LM is part; what is chosen for it is chosen on validation, and kept by `name`."""
    texts = weigh_texts(run, lm, alone)
    return Teacher(texts, weigh_domain(run, lm, alone(run), texts, name=name), alone)


def learn_together(run: Run, decoder: Decoder, alone: Callable[[Run], Params], taught_by: dict[str, Teacher]) -> Fitted:
    """Runs BDLM's rounds and lessons. `taught_by` is filled with the teacher "after" each; one that is there stays.

    So a refit, which has no validation, hears the teachers that the run before it has chosen.
    """

    def hear(stage: str, fitted: Fitted) -> Teacher:
        if stage not in taught_by:
            name = "teacher.json" if stage == last else f"{stage}_teacher.json"
            taught_by[stage] = choose_teacher(run, fitted.params["lm"], alone, name=name)
        return taught_by[stage]

    last = "taught" if run.config.mutual.taught.rounds else "bdlm"
    fitted = stages.train_bdlm(run, decoder, alone(run))
    if last == "taught":
        reader = hear("bdlm", fitted).read(run, "validation")
        fitted = stages.teach_both(run, decoder, fitted.params["lm"], alone(run), reader)
    taught_by["after"] = hear(last, fitted)
    return fitted


def weigh_texts(run: Run, lm: Params, alone: Callable[[Run], Params]) -> TextHead | None:
    """Chooses on validation how much likeness of items weighs beside the LM, where `mutual.text_head` reads it.

    One weight after the other, twice; what each pair reached is kept in text_head.json.
    """
    c = run.config.mutual
    if c.text_head == "none":
        return None
    content_IC = run.content_IC if c.text_head == "words" else domain_content(run, alone(run))
    reader = reading.bdlm_reader(run, "validation", texts=TextHead(content_IC))
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


def domain_content(run: Run, alone: Params) -> np.ndarray:
    """The domain model's rows of items (I, D) as it was alone, over their root mean square norm: of training alone."""
    view = scorers.domain_view(build.make_arm(run, run.config.domain.model, parts=KNOWN["validation"]), alone)
    rows_ID = np.asarray(view["item"], np.float32)
    return rows_ID / np.sqrt(np.mean(np.sum(np.square(rows_ID[run.warm_I]), axis=1)))


def weigh_domain(
    run: Run, lm: Params, alone: Params, texts: TextHead | None, *, name: str = "teacher.json"
) -> float | None:
    """Chooses on validation how much the domain model alone weighs beside the LM, where `mutual.teacher` is "pool".

    What each weight reached is kept in a file of that name: the best of them bounds what there is to teach. None: the
    LM teaches; infinity: the domain model.
    """
    if (teacher := run.config.mutual.teacher) != "pool":
        return np.inf if teacher == "domain" else None
    reader, reached = reading.bdlm_reader(run, "validation", texts=texts), {}
    pair, beside = reader.widen(reader.read(run, lm, reader.users)), _beside(run, alone, 0.0, "validation")
    for weight in TEACHER_WEIGHTS:
        scorer = scorers.state_scorer(*beside._replace(weight=weight).widen(*pair))
        reached[weight] = stages.validate(run, scorer)[run.config.select]
    weight = max(TEACHER_WEIGHTS, key=reached.get)
    write_json(run.folder / name, {"weight": weight, "validation": {str(w): v for w, v in reached.items()}})
    return weight


def _beside(run: Run, alone: Params, weight: float, part: str) -> Beside:
    parts = KNOWN["validation"] if part == "validation" else build.parts_at_test(run.config)
    view = scorers.domain_view(build.make_arm(run, run.config.domain.model, parts=parts), alone)
    return Beside(weight, np.asarray(view["user"]), np.asarray(view["item"]))
