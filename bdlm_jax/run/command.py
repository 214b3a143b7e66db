"""What the doors that take a config share: flags checked and explained, one-sentence errors, exit codes.

Nothing heavy is imported before the flags are right.
"""

import functools
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from bdlm_jax import __version__
from bdlm_jax.run import shipped
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)
_CONFIG = ("--config", "-config")  # whose value is the next word


def start(act: Callable[[ConfigDict], None], *, needs: Sequence[str]) -> None:
    """Parses the flags, of which `needs` must be given and "config" is one, and runs act(config).

    The exit code is 2 where the input cannot be used, 1 where a loss is not finite.
    """
    app.run(functools.partial(_main, act), flags_parser=functools.partial(_parse_flags, needs=needs))


def _main(act: Callable[[ConfigDict], None], argv: list[str]) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells every step of every save
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("bdlm_jax").setLevel(logging.INFO)
    # At once: the imports below take seconds, and large data minutes.
    _LOG.info("bdlm_jax %s: %s, seed %s", __version__, argv[0], flags.FLAGS.config.get("seed"))
    from bdlm_jax.run import checks
    from bdlm_jax.runtime import malloc
    from bdlm_jax.runtime.door import REFUSED, memory_explained, refuse

    malloc.one_arena()
    remedy = "lower lm.batch_rows, raise lm.accumulate or set lm.remat; --dry_run counts what a config needs"
    try:
        with memory_explained(remedy):
            act(checks.name_config(flags.FLAGS.config, argv[0]))
    except FloatingPointError as error:
        _leave(error, code=1)
    except REFUSED as error:
        sys.exit(refuse(error))


def _parse_flags(argv: list[str], *, needs: Sequence[str]) -> list[str]:
    """Parses the flags; whatever is wrong with them is told in one sentence, with exit code 2."""
    given = _given(argv)
    if name := given.get("dataset"):
        try:
            argv = [argv[0], *shipped.dataset_words(name, list(given)), *argv[1:]]
        except InputError as error:
            _leave(error)
        given = _given(argv)
    if {"help", "helpfull", "helpshort"}.isdisjoint(given):
        if missing := [name for name in needs if not given.get(name)]:
            wanted = {"config": "experiments/X.py", "workdir": "DIR"}
            told = " ".join(f"--{name} {wanted.get(name, name.upper())}" for name in needs)
            _leave(f"--{missing[0]} is missing; give {told}.")
        found = shipped.find_experiment(given["config"])
        if not (file := Path(found.split(":")[0])).is_file():
            _leave(shipped.no_experiment(file))
        argv = [argv[0], f"--config={found}", *_without_config(argv[1:])]  # config_flags wants it before its settings
        sys.argv = argv  # where config_flags looks for them
        sys.path.insert(0, str(file.resolve().parents[1]))  # experiments import their neighbours
    if twice := _twice(argv):
        _leave(f"{twice} is given twice; give it once, several values as {twice}=\"('a', 'b')\".")
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # config_flags passes on whatever the config file or an override raises
        _leave(explain(error, argv, given["config"]))
    refuse_no_config(flags.FLAGS.config, given["config"])
    if rest[1:]:
        _leave(f"{rest[1]} is not understood; settings are written --config.key=value.")
    return [given["config"]]


def _without_config(words: list[str]) -> list[str]:
    pairs = zip(["", *words], words)
    return [word for before, word in pairs if not re.fullmatch("--?config(=.*)?", word) and before not in _CONFIG]


def _twice(argv: list[str]) -> str | None:
    """A setting that stands twice: of most the last would count, of a tuple ml_collections would join them."""
    names = [word.partition("=")[0] for word in argv if re.match(r"--?config\.", word)]
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


def _given(argv: list[str]) -> dict[str, str]:
    """The flags of a command line with their values, before anything parses them."""
    words = [(*word.lstrip("-").partition("="), after) for word, after in zip(argv[1:], [*argv[2:], ""])]
    return {name: value if equals else after for name, equals, value, after in words}


def refuse_no_config(config: object, file: str) -> None:
    """Leaves where an experiment's get_config() gives something else than the settings."""
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        _leave(f"{file}: get_config() returns a {kind}, not a ConfigDict; begin with defaults.get_config().")


def explain(error: Exception, argv: list[str], file: str) -> str:
    """What ml_collections and absl say of a setting, in one sentence."""
    text = str(error)
    if "'get_config'" in text:
        return f"{file} has no get_config(); write one that returns a ConfigDict, as experiments/tiny.py does."
    key = isinstance(error, (AttributeError, KeyError)) and re.search(r"(?:Key \W|'(?!Key ))(\w+)", text)
    if not key:
        if "Traceback" in text:
            return f"{file}: {text.splitlines()[-1]}"
        of_a_flag = isinstance(error, flags.Error) or "--" in text
        return " ".join((text if of_a_flag else f"{file}: {type(error).__name__}: {text}").split())
    flag = next((w.split("=")[0] for w in argv if re.match(rf"--?config\.[^=]*\b{key[1]}\b", w)), f"{file}: {key[1]}")
    near = re.search(r'mean "(\w+)"', text)
    return f"{flag} is no setting; " + (f"did you mean {near[1]}?" if near else "see experiments/defaults.py.")


def _leave(message, code: int = 2) -> None:
    print(f"bdlm_jax: {message}", file=sys.stderr)
    sys.exit(code)
