"""python recommend.py USER [K]: raw id, score and title of the best items that the user has not had."""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import load_file

folder = pathlib.Path(__file__).resolve().parent
table, seen = load_file(folder / "embeddings.safetensors"), load_file(folder / "seen.safetensors")
ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))


def recommend(user, k=10):
    row = ids["user_ids"].index(user)
    scores = table["item"] @ table["user"][row]
    scores[seen["item"][seen["indptr"][row] : seen["indptr"][row + 1]]] = -np.inf
    best = np.argsort(-scores, kind="stable")[: max(0, min(k, int(np.isfinite(scores).sum())))]
    return [(ids["item_ids"][i], float(scores[i]), ids["titles"][i]) for i in best]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not (k := (*sys.argv, "10")[2]).isdecimal():
        sys.exit(__doc__)
    if sys.argv[1] not in ids["user_ids"]:
        sys.exit(f"{sys.argv[1]!r} is none of the {len(ids['user_ids'])} users of this export.")
    for item, score, title in recommend(sys.argv[1], int(k)):
        print(f"{item}\t{score:.4f}\t{title}")
