"""python recommend.py USER [K]: raw id, score and title of the best items that the user has not had."""

import argparse
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

folder = pathlib.Path(__file__).resolve().parent
table, seen = load_file(folder / "embeddings.safetensors"), load_file(folder / "seen.safetensors")
ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))


def recommend(user, k=10):
    if user not in ids["user_ids"]:
        raise ValueError(f"user {user!r} is none of the {len(ids['user_ids'])} that ids.json lists.")
    if k < 1:
        raise ValueError(f"K is {k}, but at least one item must be asked for.")
    row = ids["user_ids"].index(user)
    scores = table["item"] @ table["user"][row]
    scores[seen["item"][seen["indptr"][row] : seen["indptr"][row + 1]]] = -np.inf
    best = np.argsort(-scores, kind="stable")[: max(0, min(k, int(np.isfinite(scores).sum())))]
    return [(ids["item_ids"][i], float(scores[i]), ids["titles"][i]) for i in best]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="recommend.py", usage=argparse.SUPPRESS)
    parser.add_argument("user", help="a raw user id")
    parser.add_argument("k", type=int, nargs="?", default=10, help="how many items (default 10)")
    given = parser.parse_args()
    try:
        rows = recommend(given.user, given.k)
    except ValueError as error:
        parser.error(str(error))
    for item, score, title in rows:
        print(f"{item}\t{score:.4f}\t{title}")
