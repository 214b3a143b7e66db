"""A finished run as Python holds it: `bdlm_jax.load("runs/quickstart")`. Answers are pandas tables."""

import base64
import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdlm_jax.runtime.files import damaged_file, read_json
from bdlm_jax.serving import answers, artefact
from bdlm_jax.serving.artefact import Arm, ServedDomain
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

if TYPE_CHECKING:
    import pandas as pd


class ServedRun:
    """A finished run, opened for questions: each of its arms is read when it is first asked.

    Attributes:
        folder: the run directory.
        arms: what recommends: "domain" and "lm" are BDLM's two, any other has its model's name in the results. Where a
            question names none, BDLM's domain arm answers, or else the first.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.folder = Path(workdir)
        self.arms: tuple[str, ...] = tuple(artefact.served_arms(workdir))
        if not self.arms and not (self.folder / "results.json").is_file():
            artefact.find_arm(workdir)  # says what is missing
        self._loaded: dict[str, Arm] = {}

    def __repr__(self) -> str:
        return f"ServedRun({str(self.folder)!r}, arms={self.arms})"

    @functools.cached_property
    def catalogue(self) -> Catalogue:
        """Raw ids, titles and histories."""
        return artefact.load_catalogue(self.folder)

    def arm(self, name: str = "") -> Arm:
        """The record of an arm, read once."""
        name = artefact.find_arm(self.folder, name)
        if name not in self._loaded:
            arm, names = artefact.load_arm(self.folder, name), self.catalogue
            sizes = len(names.user_ids), len(names.item_ids)
            if isinstance(arm, ServedDomain) and (len(arm.user_UD), len(arm.item_ID)) != sizes:
                folder = self.folder / "serving"
                raise InputError(f"{folder} is of two runs: its tables have other rows than its catalogue; delete it.")
            self._loaded[name] = arm
        return self._loaded[name]

    @property
    def users(self) -> list[str]:
        """The raw ids of the users."""
        return self.catalogue.user_ids

    @functools.cached_property
    def items(self) -> "Items":
        """The items, and questions about them."""
        return Items(self)

    @functools.cached_property
    def results(self) -> "pd.DataFrame":
        """What the run measured on its test users: model, slice, metric, value, users."""
        path, columns = self.folder / "results.json", ("model", "slice", "metric", "value", "users")
        again = f"the same command of bdlm_jax.main on {self.folder} makes it anew"
        if damaged_file(self.folder, path.name):
            raise InputError(f"{path} is damaged or gone, for its checksum differs; {again}.")
        rows = read_json(path, remedy=again).get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= {*columns} for row in rows):
            raise InputError(f"{path} holds no results; {again}.")
        return _table(rows, *columns)

    @property
    def report(self) -> "Page":
        """results.md, which a notebook shows with its pictures."""
        path, again = self.folder / "results.md", f"write it by python -m bdlm_jax.report --workdir {self.folder}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path} cannot be read ({why}); {again}.") from error
        if damaged_file(self.folder, path.name):
            raise InputError(f"{path} is not as it was written, for its checksum differs; {again}.")
        return Page(text, self.folder)

    def recommend(
        self,
        users: str | Iterable[str] | None = None,
        *,
        histories: Iterable[str | Sequence[str]] | None = None,
        arm: str = "",
        k: int = 10,
        **explained: Any,
    ) -> "pd.DataFrame":
        """Recommends k items, best first, to known users or to new ones by history; what they have had is left out.

        Args:
            users: raw ids, or one.
            histories: of new users: lists of raw item ids or titles, oldest first. In the table they count from 0.
            arm: one of `arms`.
            explained: `explain`, `temperature`, `top_p` and `seed` of `answers.recommend`.

        Returns:
            Columns user (or history), rank, item, title, score and, explained, words.

        Raises:
            InputError: an id or title that the run does not know, with those that look alike.
        """
        users = [users] if isinstance(users, str) else users if users is None else [*users]
        histories = None if histories is None else [*histories]
        found = answers.recommend(self.catalogue, self.arm(arm), users=users, histories=histories, k=k, **explained)
        name, keys = ("history", range(len(found))) if users is None else ("user", map(str, users))
        rows = [{name: key, **row} for key, answer in zip(keys, found) for row in answer]
        return _table(rows, name, "rank", "item", "title", "score")

    def history(self, user: str) -> "pd.DataFrame":
        """What a known user has had, oldest first: rank, item, title."""
        return _table(answers.history(self.catalogue, user), "rank", "item", "title")


class Page(str):
    """A page of Markdown; a notebook shows it as one, and holds the pictures that it names."""

    def __new__(cls, text: str, folder: Path) -> "Page":
        page = super().__new__(cls, text)
        page._folder = folder
        return page

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        return re.sub(r"(?<=\]\()[^()]+\.png(?=\))", self._embedded, self)

    def _embedded(self, picture: re.Match) -> str:
        path = self._folder / picture[0]
        if not path.is_file():
            return picture[0]
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


class Items:
    """The items of a run, and what its arms make of them."""

    def __init__(self, run: ServedRun):
        self._run = run

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ids(self) -> list[str]:
        """The raw ids."""
        return self._run.catalogue.item_ids

    @property
    def titles(self) -> list[str]:
        """Their titles, in the order of the ids."""
        return self._run.catalogue.titles

    def nearest(self, item: str, *, arm: str = "", k: int = 10) -> "pd.DataFrame":
        """The k items most like one, given by its raw id, its title or a part of it: rank, item, title, score.

        The score is the cosine of the angle between their rows, of -1 to 1.
        """
        rows = answers.nearest(self._run.catalogue, self._run.arm(arm), item, k=k)
        return _table(rows, "rank", "item", "title", "score")

    def audience(self, item: str, *, arm: str = "", k: int = 10) -> "pd.DataFrame":
        """The k users on whose list an item stands highest, among those who have not had it: user, rank."""
        return _table(answers.audience(self._run.catalogue, self._run.arm(arm), item, k=k), "user", "rank")

    def same_titles(self) -> list[list[str]]:
        """Groups of raw ids that share one title to the letter: no text can tell them apart."""
        return answers.same_titles(self._run.catalogue)


def _table(rows: Iterable[dict], *columns: str) -> "pd.DataFrame":
    import pandas as pd  # here: the command line answers without

    frame = pd.DataFrame(list(rows))
    return frame.reindex(columns=[*columns, *frame.columns.difference(columns)])
