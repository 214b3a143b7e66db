"""python -m bdlm_jax.tune --config experiments/X.py --model WORD --trials N --workdir DIR [--config.key=value].

Tries settings of one model on validation; what is best lies in DIR/WORD/tuned.json and, to paste, in settings.txt.
"""

from absl import flags
from ml_collections import config_flags

from bdlm_jax.run import command
from bdlm_jax.types import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the study; an unfinished one in it is continued.")
_MODEL = flags.DEFINE_string("model", None, "A word of config.models with a space in run/search.py SPACES.")
_TRIALS = flags.DEFINE_integer("trials", 20, "How many settings are tried, the config's own first.")


def main(config) -> None:
    try:
        from bdlm_jax.run import search
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed; pip install -e ".[tune]".') from None

    tuned = search.tune(config, _WORKDIR.value, word=_MODEL.value, n_trials=_TRIALS.value)
    budget = tuned["budget"]
    print(f"{tuned['model']}: {tuned['select']} {tuned['value']:.4f} on validation, of {budget['trials']} trials")
    print(*(f"    c.{key} = {value!r}" for key, value in tuned["settings"].items()), sep="\n")


if __name__ == "__main__":
    command.start(main, needs=("config", "model", "workdir"))
