"""The story of a run, top to bottom: data → pretrain → each contender trained, tested, and served → report.

Every stage keeps its checkpoints under workdir/<stage>; a finished stage is read back, an unfinished one goes on where
it was, and the final numbers are the same to the bit however often the run was killed.
"""

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from bdlm_jax.data.splits import TEST
from bdlm_jax.evaluation import evaluate
from bdlm_jax.report import __main__ as report
from bdlm_jax.run import agenda, checks, contenders, general, served, stages
from bdlm_jax.run.build import Run, start_run
from bdlm_jax.run.contenders import Entry
from bdlm_jax.run.workdir import begin, finish, hold, record
from bdlm_jax.runtime import distributed, parallel
from bdlm_jax.runtime.files import read_json, write_json
from bdlm_jax.runtime.log import StopSignal, progress
from bdlm_jax.serving import artefact
from bdlm_jax.serving.artefact import ServedDomain, ServedLM
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """Trains and evaluates every model of the config, and writes the run directory; returns what results.json holds.

    An unfinished run in `workdir` is continued; `log.Stopped` is raised after SIGTERM or SIGINT, when all is saved.
    """
    checks.check_config(config)
    began = time.monotonic()
    with hold(workdir) as folder, StopSignal() as stop:
        parallel.enable_compilation_cache(folder / "compiled")
        begin(folder, config)

        # Data: the split, the frozen candidates, the words.
        run, rows = start_run(config, folder, stop), []
        data = run.data
        record(folder, config)  # not before: data that is refused leaves no config behind
        _tell(run)
        run = agenda.follow(run)

        # Pretrain: the "general LLM" of a small world, once and only if somebody needs it.
        decoder = functools.cache(lambda: stages.pretrain_lm(run))

        # Every contender: trained, then tested once.
        artefact.forget_damaged(folder)
        for word in config.models:
            for entry in contenders.make_entries(run, word, decoder):
                _test(run, rows, entry)
                _serve(run, entry)
        language = _measure_language(run, decoder)

        # Report.
        evaluate.save_arrays(folder / "data" / "slices.npz", data.slices)
        name = Path(config.data.path).name if config.data.path else config.data.kind
        results = {"data": {**data.fingerprint, "name": name}, "rows": rows}
        if language:
            results["language"] = language
        if data.world is not None:
            results["ceilings"] = evaluate.ceilings(data.world, TEST, data.candidates["test"].values())
        write_json(folder / "results.json", results)
        finish(folder)
        table = report.write_report(folder, results)
    _LOG.info("tested on all targets:\n  %s", table.replace("\n", "\n  "))
    _LOG.info("finished in %.0f s; see %s", time.monotonic() - began, folder / "results.md")
    return results


def train_together(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """As `train_and_evaluate`, in each of `config.distributed.processes`; the first process alone writes `workdir`."""
    checks.check_complete(config)
    given = config.distributed.to_dict()
    # The run directory does not remember how many processes shared it.
    config.distributed.update({"coordinator": "", "processes": 1, "process": 0})
    distributed.join(**given)
    with distributed.run_folder(workdir) as folder:
        return train_and_evaluate(config, folder)


def _test(run: Run, rows: list, entry: Entry) -> None:
    """Evaluates a model on test, once: the counts of every case are kept, and read back by a later start."""
    path = run.folder / "per_user" / f"{entry.name}.npz"
    sliced = [name for name in run.data.candidates["test"] if name not in run.config.data.candidates]
    names = (*(entry.protocols or run.config.evaluate.protocols), *sliced)
    counts = _counted(path, names)
    if counts is None:
        bar, scorer = functools.partial(progress, description=f"test {entry.name}"), entry.scorer()
        evaluate.save_counts(
            path, {name: stages.count_cases(run, scorer, "test", name, progress=bar) for name in names}
        )
        counts = evaluate.load_counts(path)
    rows += evaluate.result_rows(entry.name, counts, run.data.slices)


def _counted(path: Path, names: Sequence[str]) -> dict[str, evaluate.Counts] | None:
    """The counts of an earlier test under these protocols, if there was one and they are whole."""
    if not path.exists():
        return None
    try:
        counts = evaluate.load_counts(path)
        if counts.keys() == {*names}:  # a zip whose list of members is damaged may be read without its last ones
            return counts
    except InputError:
        pass
    _LOG.warning("%s is damaged; its cases are counted again", path)
    return None


def _serve(run: Run, entry: Entry) -> None:
    """Writes what `recommend` loads of a model, once."""
    if entry.served and entry.served.arm not in artefact.served_arms(run.folder):
        record = {"domain": ServedDomain, "lm": ServedLM}[entry.served.kind](**entry.served.fields())
        catalogue = Catalogue(**served.catalogue_fields(run))
        artefact.write_arm(run.folder, entry.served.arm, record, catalogue, row=entry.name)


def _measure_language(run: Run, decoder) -> dict | None:
    """The perplexity of an own model before BDLM and after it, read once a run."""
    if "bdlm" not in run.config.models or not run.config.lm.path:
        return None
    path = run.folder / "language.json"
    if not path.exists():
        write_json(path, general.measure(run, decoder(), contenders.train_bdlm(run, decoder).lm["lm"]) or {})
    return read_json(path, remedy="delete it and start the run again") or None


def _tell(run: Run) -> None:
    data, fingerprint = run.data, run.data.fingerprint
    parts = ", ".join(f"{name} {count}" for name, count in fingerprint["parts"].items())
    _LOG.info(
        "data: %d users, %d items, %d interactions (%s), sha256 %s…, %d text tokens, on %s",
        data.n_users, data.n_items, fingerprint["interactions"], parts, fingerprint["sha256"][:12],
        run.texts.vocabulary.n_text, parallel.device_summary(),
    )  # fmt: skip
