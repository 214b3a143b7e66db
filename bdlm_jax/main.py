"""python -m bdlm_jax.main --config experiments/X.py --workdir DIR [--dataset NAME] [--config.key=value]: flags only."""

import sys

from absl import flags
from ml_collections import config_flags

from bdlm_jax.run import command, shipped

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment file, or its name.", lock_config=True)
_DATASET = flags.DEFINE_string("dataset", None, f"One of {', '.join(shipped.DATASETS)}, fetched where it is not there.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; an unfinished run in it is continued.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what the LM step needs on config.dry_run.devices, and stop.")


def main(config) -> None:
    from bdlm_jax import story
    from bdlm_jax.run import plan

    if _DATASET.value:
        shipped.fetch_dataset(_DATASET.value, config.data.path)
    (plan.print_needs if _DRY_RUN.value else story.train_together)(config, _WORKDIR.value)


if __name__ == "__main__":
    dry = any(word.lstrip("-").startswith("dry_run") for word in sys.argv[1:])
    command.start(main, needs=("config",) if dry else ("config", "workdir"))
