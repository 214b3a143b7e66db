import pytest

from bdlm_jax.train import train_and_evaluate
from bdlm_jax.types import InputError
from experiments import tiny


def test_a_run_of_another_config_is_not_continued(tmp_path):
    config = tiny.get_config()
    config.models = ("item_pop",)
    results = train_and_evaluate(config, str(tmp_path))
    config.runtime.checkpoint_seconds = 1.0  # changes nothing of what is trained
    assert train_and_evaluate(config, str(tmp_path)) == results
    config.lm.learning_rate = 0.5
    told = r"written with another config.lm.learning_rate: 0.003, and now it is 0.5; choose a new --workdir"
    with pytest.raises(InputError, match=told):
        train_and_evaluate(config, str(tmp_path))
