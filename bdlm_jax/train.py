"""The story of a run, top to bottom: data → pretrain → domain → LM → mutual rounds → refresh → evaluate → report.

Every stage keeps its checkpoints under workdir/<stage>; a finished stage is read back, an unfinished one goes on where
it was, and the final numbers are the same to the bit however often the run was killed.
"""

import functools
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_collections

from bdlm_jax import __version__
from bdlm_jax.data import twins
from bdlm_jax.data.splits import TEST, TRAIN
from bdlm_jax.domain.closed_form import CLOSED_FORM, interaction_matrix
from bdlm_jax.domain.models import MODELS
from bdlm_jax.evaluation import evaluate, scorers
from bdlm_jax.report import __main__ as report
from bdlm_jax.run import checks, served, stages
from bdlm_jax.run.build import Run, make_arm, parts_at_test, start_run
from bdlm_jax.run.prepare import KNOWN
from bdlm_jax.runtime import distributed, parallel
from bdlm_jax.runtime.files import write_json
from bdlm_jax.runtime.log import StopSignal, progress
from bdlm_jax.serving import artefact
from bdlm_jax.serving.artefact import ServedDomain, ServedLM
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """Trains and evaluates every model of the config, and writes the run directory; returns what results.json holds.

    An unfinished run in `workdir` is continued; `fit.Stopped` is raised after SIGTERM or SIGINT, when all is saved.
    """
    checks.check_config(config)
    folder, began = Path(workdir), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    parallel.enable_compilation_cache(folder / "compiled")
    _record(config, folder)

    with StopSignal() as stop:
        # Data: the split, the frozen candidates, the words.
        run = start_run(config, folder, stop)
        data, wanted, rows = run.data, config.models, []
        test = functools.partial(_test, run, rows)
        _tell(run)

        # The yardsticks that need no training.
        if "item_pop" in wanted:
            test("item_pop", lambda: scorers.popularity_scorer(data.split.degree(*KNOWN["test"])))
        for model in [name for name in CLOSED_FORM if name in wanted]:
            test(model, functools.partial(_closed_form_scorer, run, model))

        # Pretrain: the "general LLM" of a small world.
        decoder = stages.pretrain_lm(run) if {"text_lm", "ids_lm", "bdlm"} & set(wanted) else None

        # Domain: each collaborative model alone; BDLM starts from `domain.model`.
        alone, starts = {}, [config.domain.model] if "bdlm" in wanted else []
        for model in dict.fromkeys(name for name in (*wanted, *starts) if name in MODELS):
            alone[model] = stages.train_domain(run, model).params["domain"]
            if model in wanted:
                test(model, functools.partial(_domain_scorer, run, model, alone[model]))

        # LM: each language model alone.
        if "text_lm" in wanted:
            text = stages.train_text_lm(run, decoder).params["lm"]["lm"]
            protocols = config.evaluate.text_protocols
            test("text_lm", lambda: stages.text_lm_scorer(run, text, "test"), protocols=protocols)
        if "ids_lm" in wanted:
            ids = stages.train_ids_lm(run, decoder).params["lm"]
            test("ids_lm", lambda: stages.ids_reader(run, "test").scorer(run, ids))

        # Mutual rounds, then the domain arm once more against the LM states of test time.
        if "bdlm" in wanted:
            bdlm = stages.train_bdlm(run, decoder, alone[config.domain.model])
            test("bdlm_lm", lambda: stages.bdlm_reader(run, "test").scorer(run, bdlm.params["lm"]))
            distilled = stages.distill_domain(run, bdlm)
            refreshed = stages.refresh_domain(run, bdlm, distilled).params["domain"]
            test("bdlm_domain", lambda: _domain_scorer(run, config.domain.model, refreshed))
            arm = make_arm(run, config.domain.model)
            test("bdlm_domain_unrefreshed", lambda: scorers.domain_scorer(arm, distilled.params["domain"]))
            if not artefact.is_served(folder):
                artefact.write_serving(
                    folder,
                    Catalogue(**served.catalogue_fields(run)),
                    ServedDomain(**served.domain_fields(run, refreshed)),
                    ServedLM(**served.lm_fields(run, bdlm.params["lm"])),
                )

        # Report.
        evaluate.save_arrays(folder / "data" / "slices.npz", data.slices)
        name = Path(config.data.path).name if config.data.path else config.data.kind
        results = {"data": {**data.fingerprint, "name": name}, "rows": rows}
        if data.world is not None:
            results["ceilings"] = twins.ceilings(data.world, TEST, data.candidates["test"].values())
        write_json(folder / "results.json", results)
        report.write_report(folder, results)
    _LOG.info("finished in %.0f s; see %s", time.monotonic() - began, folder / "results.md")
    return results


def train_together(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """As `train_and_evaluate`, in each of `config.distributed.processes`; the first process alone writes `workdir`."""
    given = config.distributed.to_dict()
    # The run directory does not remember how many processes shared it.
    config.distributed.update({"coordinator": "", "processes": 1, "process": 0})
    distributed.join(**given)
    with distributed.run_folder(workdir) as folder:
        return train_and_evaluate(config, folder)


def _closed_form_scorer(run: Run, model: str) -> evaluate.CatalogueScorer:
    """Fitted on training, as what is trained by steps is; a user's history at test time has the validation item."""
    split, sizes = run.data.split, {"n_users": run.data.n_users, "n_items": run.data.n_items}
    train_UI, known_UI = (interaction_matrix(*split.edges(*parts), **sizes) for parts in ((TRAIN,), KNOWN["test"]))
    return scorers.closed_form_scorer(known_UI, CLOSED_FORM[model](train_UI, **run.config[model].to_dict()))


def _domain_scorer(run: Run, model: str, params) -> evaluate.CatalogueScorer:
    return scorers.domain_scorer(make_arm(run, model, parts=parts_at_test(run.config)), params)


def _test(run: Run, rows: list, model: str, make_scorer, *, protocols=None) -> None:
    """Evaluates a model on test, once: the counts of every case are kept, and read back by a later start."""
    path = run.folder / "per_user" / f"{model}.npz"
    if not path.exists():
        bar = functools.partial(progress, description=f"test {model}")
        sliced = [name for name in run.data.candidates["test"] if name not in run.config.data.candidates]
        scorer, names = make_scorer(), (*(protocols or run.config.evaluate.protocols), *sliced)
        evaluate.save_counts(
            path, {name: stages.count_cases(run, scorer, "test", name, progress=bar) for name in names}
        )
    rows += evaluate.result_rows(model, evaluate.load_counts(path), run.data.slices)


def _tell(run: Run) -> None:
    data, fingerprint = run.data, run.data.fingerprint
    parts = ", ".join(f"{name} {count}" for name, count in fingerprint["parts"].items())
    _LOG.info(
        "data: %d users, %d items, %d interactions (%s), sha256 %s…, %d text tokens, on %s",
        data.n_users, data.n_items, fingerprint["interactions"], parts, fingerprint["sha256"][:12],
        run.texts.vocabulary.n_text, parallel.device_summary(),
    )  # fmt: skip


def _record(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Keeps the resolved config, the versions and the revision; refuses to continue a run of another config."""
    path, now = folder / "config.json", json.loads(config.to_json_best_effort())
    if path.exists():
        before, after = (dict(_flat(tree)) for tree in (json.loads(path.read_text(encoding="utf-8")), now))
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key) and key != "name" and not key.startswith("runtime."):
                raise InputError(
                    f"{path} was written with another config.{key}: {before.get(key)!r}, and now it is "
                    f"{after.get(key)!r}; choose a new --workdir, or the old settings."
                )
    write_json(path, now)
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "jraph", "numpy")
    facts = {"python": sys.version.split()[0], "devices": parallel.device_summary(), "cores": os.cpu_count()}
    versions = {"bdlm_jax": __version__, **{name: importlib.metadata.version(name) for name in names}}
    write_json(folder / "environment.json", {**facts, **versions, "git": _revision()})


def _flat(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
