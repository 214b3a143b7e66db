"""python -m bdlm_jax.main --config experiments/X.py --workdir DIR [--config.key=value]: flags only."""

import logging
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from bdlm_jax.types import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; an unfinished run in it is continued.")


def main(argv):
    from bdlm_jax import train

    try:
        train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    except InputError as error:
        print(f"bdlm_jax: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells every step of every save
    logging.getLogger("bdlm_jax").setLevel(logging.INFO)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
