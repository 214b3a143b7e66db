"""python -m bdlm_jax.sweep --config X --seeds 5 --set key=a,b --workdir DIR [--jobs N]: a grid of runs, side by side.

Each lies in DIR under the name of its settings, with the stages that it shares with others in DIR/stages; a second
start skips what is finished and goes on with the rest.
"""

import argparse
import hashlib
import itertools
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from bdlm_jax.run import command, shipped
from bdlm_jax.runtime.door import REFUSED, refuse
from bdlm_jax.runtime.log import StopSignal
from bdlm_jax.types import InputError

TELL_SECONDS = 30.0
LONGEST_NAME = 150


def plan_runs(
    config: str, workdir: str | os.PathLike, *, seeds: int = 0, grid: Sequence[str] = (), hyper: bool = False
) -> dict[str, dict[str, str]]:
    """Names every run of a grid with its settings, and refuses what cannot run before any of them starts.

    Args:
      grid: "key=value,value" each; commas within brackets do not separate.
      hyper: take the settings that the experiment's `get_hyper` returns, too.
    """
    from bdlm_jax.run import checks  # here: in the process that plans alone, which lets go of its devices
    from bdlm_jax.run.workdir import refuse_other_config

    file = config.split(":")[0]
    if not Path(file).is_file():
        raise InputError(shipped.no_experiment(file))
    sys.path.insert(0, str(Path(file).resolve().parents[1]))
    axes = [_axis(words) for words in grid] + ([[{"seed": str(seed)} for seed in range(seeds)]] if seeds else [])
    if hyper:
        made = runpy.run_path(file).get("get_hyper")
        if made is None:
            raise InputError(f"--hyper: {file} has no get_hyper(); write one, or give --set.")
        axes.insert(0, [{key: str(value) for key, value in settings.items()} for settings in made()])
    runs = {}
    for chosen in itertools.product(*axes):
        settings: dict[str, str] = {}
        for one in chosen:
            if twice := settings.keys() & one.keys():
                raise InputError(f"{min(twice)} is set twice, by --set, --seeds or --hyper; set it once.")
            settings |= one
        name = _name(settings) or Path(file).stem
        resolved = checks.name_config(read_config(config, settings), config)
        checks.check_config(resolved)
        refuse_other_config(Path(workdir) / name, resolved)
        runs[name] = settings
    return runs


def read_config(file: str, settings: dict[str, str]) -> ConfigDict:
    """Reads an experiment with some settings changed, as `--config.key=value` would."""
    values = flags.FlagValues()
    words = ["sweep", f"--config={file}", *(f"--config.{key}={value}" for key, value in settings.items())]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=words)
    try:
        values(words)
    except Exception as error:  # config_flags passes on whatever the config file or an override raises
        raise InputError(command.explain(error, words, file).replace("--config.", "--set ")) from None
    command.refuse_no_config(values.config, file)
    return values.config


def run_all(commands: dict[Path, list[str]], *, jobs: int) -> dict[Path, str]:
    """Runs the command of every folder that holds no finished run, `jobs` at once, and says how each ended.

    One job has the terminal; several write into their folder's log.txt. A stop is passed on once, and waited for.
    """
    waiting = [folder for folder in commands if not is_finished(folder)]
    ended = {folder: "finished before" for folder in commands if folder not in waiting}
    running: dict[Path, subprocess.Popen] = {}
    told, told_at = False, time.monotonic()
    with StopSignal() as stop:
        while running or (waiting and not stop.requested):
            while waiting and len(running) < jobs and not stop.requested:
                folder = waiting.pop(0)
                print(f"{folder}: started, {len(waiting)} wait", flush=True)
                running[folder] = _start(folder, commands[folder], in_file=jobs > 1)
            if stop.requested and not told:
                told = True
                for process in running.values():
                    process.terminate()
            time.sleep(0.1)
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                code = running.pop(folder).returncode
                ended[folder] = _ending(folder, code, stopped=stop.requested)
                print(f"{folder}: {ended[folder]}", flush=True)
            if jobs > 1 and time.monotonic() - told_at > TELL_SECONDS:
                told_at = time.monotonic()
                for folder in running:
                    print(f"{folder}: {_last_line(folder)}", flush=True)
    return {folder: ended.get(folder, "not started") for folder in commands}


def is_finished(folder: Path) -> bool:
    return (folder / "results.md").is_file()  # what a run writes last


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdlm_jax.sweep", description="Trains a grid of runs.")
    parser.add_argument("--config", required=True, help="an experiment file, or its name")
    parser.add_argument("--workdir", required=True, help="the folder of the runs and of the stages that they share")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="each with the seeds 0 to N-1")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=A,B", help="each with each of the values")
    parser.add_argument("--hyper", action="store_true", help="each of the experiment's get_hyper()")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once")
    given = parser.parse_args(arguments)
    given.config, workdir = shipped.find_experiment(given.config), Path(given.workdir)
    try:
        for option, number, least in (("--jobs", given.jobs, 1), ("--seeds", given.seeds, 0)):
            if number < least:
                raise InputError(f"{option} is {number}; give a number of at least 1.")
        # A process of its own: this one never holds a device that the runs need.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            options = {"seeds": given.seeds, "grid": given.set, "hyper": given.hyper}
            runs = pool.submit(plan_runs, given.config, given.workdir, **options).result()
    except REFUSED as error:
        return refuse(error)
    commands = {
        workdir / name: [
            sys.executable, "-m", "bdlm_jax.main", f"--config={given.config}", f"--workdir={workdir / name}",
            *(f"--config.{key}={value}" for key, value in settings.items()),
            f"--config.runtime.store={workdir / 'stages'}",
        ]
        for name, settings in runs.items()
    }  # fmt: skip
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((workdir / "compiled").absolute()))
    from bdlm_jax import compare  # after the plan, which says at once what is wrong with the words

    ended = run_all(commands, jobs=given.jobs)
    finished = [str(folder) for folder in commands if is_finished(folder)]
    if finished:
        compare.main(finished)
    print("\n".join(f"{folder}: {how}" for folder, how in ended.items()))
    if "not started" in ended.values() or "stopped" in ended.values():
        print("stopped; the same command goes on")
        return 128 + signal.SIGTERM
    return int(any(how.startswith("failed") for how in ended.values()))


def _axis(words: str) -> list[dict[str, str]]:
    key, equals, text = words.partition("=")
    if not key or not equals:
        raise InputError(f"--set {words} is not understood; write --set key=value,value.")
    values = re.findall(r"(?:[^,()\[\]]|\([^()]*\)|\[[^\[\]]*\])+", text) or [""]
    return [{key: value} for value in dict.fromkeys(values)]


def _name(settings: dict[str, str]) -> str:
    whole = ",".join(f"{key}={value}" for key, value in settings.items())
    name = re.sub(r"[^\w.=,+-]+", "_", whole)[:LONGEST_NAME]
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _start(folder: Path, command: list[str], *, in_file: bool) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    # In a session of its own, so that a terminal's Ctrl-C comes once, from here.
    if not in_file:
        return subprocess.Popen(command, start_new_session=True)
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)


def _ending(folder: Path, code: int, *, stopped: bool) -> str:
    if is_finished(folder):
        return "finished"
    # A run that is still importing dies of it, and has nothing to save.
    if stopped and code in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM):
        return "stopped"
    line = _last_line(folder)
    how = f"failed with exit code {code}" if code else "failed: somebody else has stopped it"
    return f"{how}: {line}" if line else how


def _last_line(folder: Path) -> str:
    path = folder / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
