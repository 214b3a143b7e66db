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
    from bdlm_jax.run import checks, plan

    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells every step of every save
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("bdlm_jax").setLevel(logging.INFO)
    try:
        checks.name_config(_CONFIG.value, argv[0])
        (plan.print_needs if _DRY_RUN.value else train.train_together)(_CONFIG.value, _WORKDIR.value)
    except (checks.InputError, FloatingPointError) as error:
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
        _leave(_explain(error, argv, given["config"]))
    if rest[1:]:
        _leave(f"{rest[1]} is not understood; settings are written --config.key=value.")
    return [given["config"]]


def _explain(error: Exception, argv: list[str], file: str) -> str:
    """What ml_collections and absl say of a setting, in one sentence."""
    text = str(error)
    key = isinstance(error, (AttributeError, KeyError)) and re.search(r"(?:Key \W|'(?!Key ))(\w+)", text)
    if not key:
        return f"{file}: {text.splitlines()[-1]}" if "Traceback" in text else " ".join(text.split())
    flag = next((w.split("=")[0] for w in argv if re.match(rf"--?config\..*\b{key[1]}\b", w)), f"{file}: {key[1]}")
    near = re.search(r'mean "(\w+)"', text)
    return f"{flag} is no setting; " + (f"did you mean {near[1]}?" if near else "see experiments/defaults.py.")


def _leave(message, code: int = 2) -> None:
    print(f"bdlm_jax: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
