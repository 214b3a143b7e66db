"""python -m bdlm_jax.main --config experiments/X.py --workdir DIR [--config.key=value]: flags only."""

import logging
import re
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "An experiment file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; an unfinished run in it is continued.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what the LM step needs on config.dry_run.devices, and stop.")


def main(argv: list[str]) -> None:
    from bdlm_jax import train
    from bdlm_jax.run import checks as config_check
    from bdlm_jax.run import plan as dry_run

    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells every step of every save
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("bdlm_jax").setLevel(logging.INFO)
    try:
        config_check.name_config(_CONFIG.value, argv[0])
        (dry_run.print_needs if _DRY_RUN.value else train.train_together)(_CONFIG.value, _WORKDIR.value)
    except (config_check.InputError, FloatingPointError) as error:
        _leave(error, code=1 if isinstance(error, FloatingPointError) else 2)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; whatever is wrong with them is told in one sentence, with exit code 2."""
    words = [(*word.lstrip("-").partition("="), after) for word, after in zip(argv[1:], [*argv[2:], ""])]
    given = {name: value if equals else after for name, equals, value, after in words}
    if {"help", "helpfull", "helpshort"}.isdisjoint(given):
        if missing := [f"--{n}" for n in ("config", "workdir")[: 2 - ("dry_run" in given)] if not given.get(n)]:
            _leave(f"{missing[0]} is missing; give --config experiments/X.py --workdir DIR.")
        if not (file := Path(given["config"].split(":")[0])).is_file():
            _leave(f"--config: {file} is no file; give an experiment file such as experiments/quickstart.py.")
        sys.path.insert(0, str(file.resolve().parents[1]))  # experiments import their neighbours
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # config_flags passes on whatever the config file or an override raises
        wrong = re.search(r"'(\w+)\\?'", str(error)) if isinstance(error, (AttributeError, KeyError)) else None
        flag = next((w for w in argv if wrong and re.match(rf"--?config\..*\b{wrong[1]}\b", w)), None)
        hint = (
            f"did you mean {m[1]}?" if (m := re.search(r'mean "(\w+)"', str(error))) else "see experiments/defaults.py."
        )
        _leave(f"{flag.split('=')[0]} is no setting; {hint}" if flag else " ".join(str(error).split()))
    if rest[1:]:
        _leave(f"{rest[1]} is not understood; settings are written --config.key=value.")
    return [given["config"]]


def _leave(message, code: int = 2) -> None:
    print(f"bdlm_jax: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
