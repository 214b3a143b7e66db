"""Both arms' item vectors before and after BDLM on one plane, and how far the arms agree on who is near whom."""

from typing import NamedTuple

import numpy as np

from bdlm_jax.report.finished_run import Finished
from bdlm_jax.runtime.files import damaged_file, load_safetensors, read_json
from bdlm_jax.types import InputError

MOST_ITEMS = 1500
NEIGHBOURS = 10


class ItemMap(NamedTuple):
    """Points (S, 2) by panel of the S items shown; `agreement` is the mean number of common nearest items, by time."""

    titles: list[str]
    popularity_S: np.ndarray
    points: dict[str, np.ndarray]
    agreement: dict[str, float]


def item_map(run: Finished) -> ItemMap | None:
    """Reads the tables that a run directory keeps and puts them on one plane; None where they are not there.

    Every table is centred, scaled to one mean square, and turned by the rotation that brings it nearest the domain
    arm's last table (orthogonal Procrustes: R = U·Vᵀ of XᵀY = U·S·Vᵀ); the plane is spanned by the first two principal
    components of all tables together. Popular and rare items are sampled alike.
    """
    tables, catalogue = _tables(run), run.folder / "serving" / "catalogue.json"
    if tables is None or not catalogue.is_file():
        return None
    remedy = f"delete {catalogue.parent}, and the same command of bdlm_jax.main makes it anew"
    if damaged_file(catalogue.parent, catalogue.name):
        raise InputError(f"{catalogue} is damaged, for its checksum differs; {remedy}.")
    titles = read_json(catalogue, remedy=remedy)["titles"]
    degree_I = load_safetensors(run.folder / "serving" / "domain.safetensors")["degree"]
    order_I = np.argsort(-degree_I, kind="stable")
    shown_S = order_I[np.linspace(0, len(order_I) - 1, min(MOST_ITEMS, len(order_I))).astype(int)]
    tables = {name: _scaled(table[shown_S]) for name, table in tables.items()}
    width = max(table.shape[1] for table in tables.values())
    tables = {name: np.pad(table, ((0, 0), (0, width - table.shape[1]))) for name, table in tables.items()}
    last = tables["domain arm after"]
    turned = {name: table @ _rotation(table, last) for name, table in tables.items()}
    _, _, components = np.linalg.svd(np.concatenate(list(turned.values())), full_matrices=False)
    points = {name: table @ components[:2].T for name, table in turned.items()}
    pairs = {time: [t for name, t in tables.items() if name.endswith(time)] for time in ("before", "after")}
    agreement = {time: _agreement(*pair) for time, pair in pairs.items() if len(pair) == 2}
    return ItemMap([str(titles[i]) for i in shown_S], degree_I[shown_S], points, agreement)


def _tables(run: Finished) -> dict[str, np.ndarray] | None:
    """The item tables by panel; the LM's rows are those that it scores items by."""
    # With data.refit what was tested lies in a folder of its own.
    folder = next((at for at in (run.folder / "refit", run.folder) if (at / "refresh").is_dir()), run.folder)
    paths = {
        "domain arm before": folder / run.domain_model / "best_domain.safetensors",
        "LM arm before": folder / "ids_lm" / "best_lm.safetensors",
        "domain arm after": folder / "refresh" / "best_domain.safetensors",
        "LM arm after": folder / "refresh" / "view.safetensors",
    }
    found = {name: load_safetensors(path) for name, path in paths.items() if path.is_file()}
    if not {"domain arm after", "LM arm after"} <= found.keys():
        return None
    tables, m = {}, run.config["mutual"]
    # Behind the LM's own columns stand those of what is added to its scores, and of a domain model that teaches too.
    width = run.config["shared"]["width"]
    added = {"words": m["text_width"], "graph": width}.get(m.get("text_head"), 0)
    added += width * (m.get("teacher") == "pool")
    for name, tree in found.items():
        rows = tree.get("rows_item")
        table = rows[:, : rows.shape[1] - added] if name == "LM arm after" else tree["shared"]["item"]
        tables[name] = table @ tree["lm"]["bridge"]["into"] if name == "LM arm before" else table
    return tables


def _scaled(table: np.ndarray) -> np.ndarray:
    table = table.astype(np.float64) - table.mean(0)
    return table / max(float(np.sqrt((table**2).sum(1).mean())), 1e-12)


def _rotation(table: np.ndarray, to: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(table.T @ to)
    return left @ right


def _agreement(*tables: np.ndarray) -> float:
    """How many of an item's nearest items by cosine two tables have in common, on average."""
    nearest = []
    for table in tables:
        unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, -np.inf)
        places = np.argpartition(-cosine, min(NEIGHBOURS, len(cosine) - 1) - 1, axis=1)[:, :NEIGHBOURS]
        nearest.append(np.zeros_like(cosine, bool))
        np.put_along_axis(nearest[-1], places, True, axis=1)
    return float((nearest[0] & nearest[1]).sum(1).mean())
