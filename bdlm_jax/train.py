"""The story of a run, top to bottom: data → pretrain → domain → LM → mutual rounds → refresh → evaluate → report.

Every stage keeps its checkpoints under workdir/<stage>; a finished stage is read back, an unfinished one goes on where
it was, and the final numbers are the same to the bit however often the run was killed.
"""

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_collections

from bdlm_jax import __version__
from bdlm_jax.data import twins as synthetic
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.evaluation import evaluate
from bdlm_jax.evaluation import scorers as models
from bdlm_jax.report import __main__ as report
from bdlm_jax.run import checks as config_check
from bdlm_jax.run import rows as lm_rows
from bdlm_jax.run import served, stages
from bdlm_jax.run.prepare import KNOWN, prepare_data, prepare_vocabulary
from bdlm_jax.run.stages import DOT_ARM, Run
from bdlm_jax.runtime import distributed, parallel
from bdlm_jax.runtime.files import write_json
from bdlm_jax.runtime.log import StopSignal, progress
from bdlm_jax.serving import artefact
from bdlm_jax.serving.artefact import ServedDomain, ServedLM
from bdlm_jax.serving.catalogue import Catalogue
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """Trains and evaluates every model of the config, and writes the run directory.

    Args:
      config: of an experiment; it is checked before anything else.
      workdir: the run directory; an unfinished run in it is continued.

    Returns:
      What results.json holds.

    Raises:
      InputError: the config, the data or the workdir cannot be used.
      fit.Stopped: after SIGTERM or SIGINT, when everything is saved.
    """
    config_check.check_config(config)
    folder, began = Path(workdir), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    parallel.enable_compilation_cache(folder / "compiled")
    _record(config, folder)

    with StopSignal() as stop:
        # Data: the split, the frozen candidates, the words.
        data = prepare_data(config, folder / "data")
        vocabulary = prepare_vocabulary(config, data, folder / "tokenizer")
        texts = lm_rows.encode_texts(config, data, vocabulary)
        run = Run(config, folder, data, texts, stop, jax.random.key(config.seed))
        _LOG.info(
            "data: %d users, %d items, %d interactions (%s), sha256 %s…, %d text tokens, on %s",
            data.n_users, data.n_items, data.fingerprint["interactions"],
            ", ".join(f"{k} {v}" for k, v in data.fingerprint["parts"].items()),
            data.fingerprint["sha256"][:12], vocabulary.n_text, parallel.device_summary(),
        )  # fmt: skip
        wanted, rows = config.models, []

        # The yardstick that needs no training.
        if "item_pop" in wanted:
            rows += _test(run, "item_pop", lambda: models.popularity_scorer(data.split.degree(*KNOWN["test"])))

        # Pretrain: the "general LLM" of a small world.
        pretrained = stages.pretrain_lm(run) if {"text_lm", "ids_lm", "bdlm"} & set(wanted) else None

        # Domain: each collaborative model alone.
        if "mf" in wanted:
            c = config.mf
            fitted = stages.train_domain(
                run, "mf", stage="mf", learning_rate=c.learning_rate, regularisation=c.regularisation, epochs=c.epochs
            )
            rows += _test(run, "mf", lambda: models.domain_scorer(DOT_ARM, fitted.params["domain"]))
        if {"lightgcn", "bdlm"} & set(wanted):
            c = config.domain
            alone = stages.train_domain(
                run, c.model, stage=c.model,
                learning_rate=c.learning_rate, regularisation=c.regularisation, epochs=c.epochs,
            )  # fmt: skip
            if "lightgcn" in wanted:
                rows += _test(
                    run, c.model, lambda: models.domain_scorer(stages.make_test_arm(run), alone.params["domain"])
                )

        # LM: each language model alone.
        if "text_lm" in wanted:
            text = stages.train_text_lm(run, pretrained)
            protocols = config.evaluate.text_protocols
            scorer = lambda: stages.text_lm_scorer(run, text.params["lm"]["lm"], "test")  # noqa: E731
            rows += _test(run, "text_lm", scorer, protocols=protocols)
        if "ids_lm" in wanted:
            ids = stages.train_ids_lm(run, pretrained)
            rows += _test(run, "ids_lm", lambda: _lm_test_scorer(run, ids.params["lm"], "ids", DOT_ARM, "layer0"))

        # Mutual rounds, then the domain arm once more against the LM states of test time.
        if "bdlm" in wanted:
            fitted = stages.train_bdlm(run, pretrained, alone.params["domain"])
            arm = stages.make_arm(run, config.domain.model)
            reads, kind = config.mutual.reads, config.prompts.kind
            rows += _test(run, "bdlm_lm", lambda: _lm_test_scorer(run, fitted.params["lm"], kind, arm, reads))
            distilled = stages.distill_domain(run, fitted, part="validation")
            epochs = min((distilled.phase["domain"] + 1) * config.domain.evaluate_every, config.mutual.distill_epochs)
            refreshed = stages.distill_domain(run, fitted, part="test", epochs=epochs)
            at_test = stages.make_test_arm(run)
            rows += _test(run, "bdlm_domain", lambda: models.domain_scorer(at_test, refreshed.params["domain"]))
            rows += _test(run, "bdlm_domain_unrefreshed", lambda: models.domain_scorer(arm, distilled.params["domain"]))
            if not artefact.is_served(folder):
                artefact.write_serving(
                    folder,
                    Catalogue(**served.catalogue_fields(run)),
                    ServedDomain(**served.domain_fields(run, refreshed.params["domain"])),
                    ServedLM(**served.lm_fields(run, fitted.params["lm"])),
                )

        # Report.
        results = {"data": {**data.fingerprint, "name": _data_name(config)}, "rows": rows}
        if data.world is not None:
            results["ceilings"] = synthetic.ceilings(data.world, TEST, data.candidates["test"].values())
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


def _lm_test_scorer(run: Run, params, kind: str, arm, reads: str):
    reading = lm_rows.reading_rows(run.config, run.data, run.texts, kind=kind, parts=KNOWN["test"])
    return stages.lm_scorer(run, params, arm, stages.make_bridge(run, reads=reads), reading)


def _test(run: Run, model: str, make_scorer, *, protocols=None) -> list[dict]:
    """Evaluates a model on test, once: the counts of every case are kept, and read back by a later start."""
    path = run.folder / "per_user" / f"{model}.npz"
    protocols = tuple(protocols or run.config.evaluate.protocols)
    if path.exists():
        counts = evaluate.load_counts(path)
    else:
        scorer, chunk, counts = make_scorer(), run.config.evaluate.chunk, {}
        bar = lambda chunks: progress(chunks, description=f"test {model}")  # noqa: E731
        sliced = [name for name in run.data.candidates["test"] if name not in run.config.data.candidates]
        for name in (*protocols, *sliced):
            if name == "full":
                user_N, item_N = run.data.split.cases(TEST)
                seen = run.data.split.histories(TRAIN, VALIDATION)
                counts[name] = evaluate.evaluate_full(scorer, user_N, item_N, seen, chunk=chunk, progress=bar)
            else:
                candidates = run.data.candidates["test"][name]
                counts[name] = evaluate.evaluate_candidates(scorer, candidates, chunk=chunk, progress=bar)
        evaluate.save_counts(path, counts)
    return evaluate.result_rows(model, counts, run.data.slices)


def _data_name(config) -> str:
    return Path(config.data.path).name if config.data.path else config.data.kind


def _record(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Keeps the resolved config, the versions and the revision; refuses to continue a run of another config."""
    path = folder / "config.json"
    resolved = json.loads(config.to_json_best_effort())
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in before.keys() | resolved.keys() if before.get(name) != resolved.get(name))
        changed = [name for name in changed if name not in ("runtime", "name")]
        if changed:
            raise InputError(
                f"{path} was written with another config.{changed[0]}; choose a new --workdir, or the old settings."
            )
    write_json(path, resolved)
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "jraph", "numpy")
    write_json(
        folder / "environment.json",
        {
            "bdlm_jax": __version__,
            "python": sys.version.split()[0],
            "devices": parallel.device_summary(),
            "cores": os.cpu_count(),
            "git": _revision(),
            **{name: importlib.metadata.version(name) for name in names},
        },
    )


def _revision() -> str:
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
