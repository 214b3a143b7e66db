"""A run directory built by hand, whose numbers are known."""

import json

import numpy as np

from bdlm_jax.evaluation.evaluate import Counts, result_rows, save_arrays, save_counts
from experiments import defaults

ALL = np.ones(100, int)
MODELS = {"lightgcn": (20, 0), "bdlm_domain": (30, 0), "bdlm_lm": (30, 0), "text_lm": (20, 1)}


def make_run(folder, *, seed=0, wins=30, twins=100, models=MODELS, **settings):
    """A run of 100 users; `models` holds for how many the target is first, and whether it ties with its twin.

    Of both arms of BDLM `wins` says for how many; the text LM has no full ranking.
    """
    folder.mkdir(parents=True)
    config = defaults.get_config()
    config.update_from_flattened_dict({"seed": seed, "mutual.rounds": 1, **settings})
    with config.unlocked():
        config.name = "twins"
    environment = {"devices": "1 x cpu (cpu), jax 1.2.3", "cores": 2, "jax": "1.2.3", "git": "abc"}
    rows, slices = [], {"all": np.ones(1, bool), "twins": np.ones(1, bool)}
    for model, (first, tied) in models.items():
        first = wins if model in ("bdlm_domain", "bdlm_lm") else first
        behind = (np.arange(100) >= first).astype(int)
        counts = {
            "cand100": Counts(np.arange(100), 0 * ALL, behind, 0 * ALL, 99 * ALL),
            "full": Counts(np.arange(100), 0 * ALL, behind, 0 * ALL, 119 * ALL),
            "pair": Counts(np.arange(100), 0 * ALL, 0 * ALL if tied else behind, tied * ALL, ALL),
        }
        if model == "text_lm":
            del counts["full"]
        save_counts(folder / "per_user" / f"{model}.npz", counts)
        rows += result_rows(model, counts, slices)
    save_arrays(folder / "data" / "slices.npz", slices)
    for row in rows if twins < 100 else ():
        if row["slice"] == "twins" and row["metric"].endswith("/pair"):
            row["users"] = twins
    data = {
        "name": "twins", "users": 100, "items": 120, "interactions": 1234, "parts": {"train": 1034, "test": 100},
        "sha256": "5a" * 32, "candidates": {"test/cand100": "c1" * 32, "validation/cand100": "d2" * 32},
    }  # fmt: skip
    ceiling = {"oracle": "text", "slice": "twins", "protocol": "pair", "users": 100, "hr@1": 0.0, "auc": 0.5}
    results = {"data": data, "rows": rows, "ceilings": [ceiling]}
    for name, content in (("config", config.to_dict()), ("environment", environment), ("results", results)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    stages = {"lightgcn": (("domain",), 2), "bdlm": (("domain", "lm"), 3), "distill": (("domain",), 2)}
    for hour, (stage, (arms, phases)) in enumerate(stages.items()):
        best = {arm: {"phase": phases - 1, "value": 0.25} for arm in arms}
        metrics = {f"validation/{arm}/ndcg@10/full": 0.2 for arm in arms}
        log = [{"stage": stage, "step": n, "time": 3600 * hour + 10 * n, **metrics} for n in range(phases)]
        (folder / stage).mkdir()
        (folder / stage / "done.json").write_text(json.dumps({"best": best, "units": 1}))
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder
