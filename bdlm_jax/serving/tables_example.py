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
    best = np.argsort(-scores, kind="stable")[: min(k, int(np.isfinite(scores).sum()))]
    return [(ids["item_ids"][i], float(scores[i]), ids["titles"][i]) for i in best]


if __name__ == "__main__":
    for item, score, title in recommend(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10):
        print(f"{item}\t{score:.4f}\t{title}")
