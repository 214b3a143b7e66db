"""A split without validation, as LightGCN's data come, from the folder to results.json."""

import pytest

from bdlm_jax.story import train_and_evaluate
from experiments import tiny


def test_what_needs_no_training_needs_no_validation(tmp_path):
    (tmp_path / "train.txt").write_text("0 1 2\n1 1 2 3\n2 4\n")
    (tmp_path / "test.txt").write_text("0 3\n2 1 2\n")
    config = tiny.get_config()
    with config.unlocked():
        config.data.kind, config.data.path, config.data.options = "adjacency", str(tmp_path), {}
        config.data.candidates, config.models, config.select = {"cand2": 1}, ("item_pop",), "hr@1/cand2"
    config.evaluate.protocols, config.evaluate.text_protocols = ("cand2", "full"), ()
    results = train_and_evaluate(config, str(tmp_path / "run"))
    assert results["data"]["parts"] == {"train": 6, "validation": 0, "test": 3}
    value = {row["metric"]: row["value"] for row in results["rows"] if row["slice"] == "all"}
    # Items 1 and 2 were had twice, 3 and 4 once: in the catalogue, 3 is level with 4 for user 0, and 1 with 2 for user
    # 2, so that ties put every target second. Of the only negatives, 4 is level with 3, and 3 below 1 and 2.
    assert (value["hr@1/full"], value["mrr/full"]) == (0, 1 / 2)
    assert value["hr@1/cand2"] == pytest.approx(2 / 3)
    assert value["auc/cand2"] == pytest.approx((1 / 2 + 1 + 1) / 3)
