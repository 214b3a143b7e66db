"""Tuning on validation: what each model may choose from, and a study that tries it within one budget.

Every trial trains the model of one word with other settings. The test part is never scored here.
"""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import optuna

from bdlm_jax.data.splits import TRAIN
from bdlm_jax.domain.closed_form import CLOSED_FORM, interaction_matrix
from bdlm_jax.domain.models import MODELS
from bdlm_jax.evaluation import scorers
from bdlm_jax.run import build, checks, stages, teachers
from bdlm_jax.run.build import Decoder, Run, start_run
from bdlm_jax.run.workdir import hold
from bdlm_jax.runtime.files import write_json
from bdlm_jax.runtime.log import StopSignal
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)


class Range(NamedTuple):
    """What a setting may be, whole numbers where both ends are; `log` draws its logarithm uniformly."""

    low: float
    high: float
    log: bool = False


_DOMAIN = {
    "shared.std": Range(0.003, 0.3, log=True),
    "domain.learning_rate": Range(1e-3, 0.1, log=True),
    "domain.regularisation": Range(1e-6, 1e-2, log=True),
    "domain.popularity": Range(0.0, 1.0),
}
_LM = {
    "lm.learning_rate": Range(5e-4, 1e-2, log=True),
    "lm.weight_decay": Range(1e-3, 0.3, log=True),
    "lm.dropout": Range(0.0, 0.5),
}
_IDS = _LM | {"lm.learning_rate_shared": Range(5e-4, 1e-2, log=True), "prompts.user_dropout": Range(0.0, 1.0)}
# The numbers of epochs are no one's to choose: they are the budget, and validation chooses the best among them.
SPACES: dict[str, dict[str, Range]] = {
    "item_knn": {"item_knn.neighbours": Range(2, 2000, log=True), "item_knn.shrink": Range(0.0, 200.0)},
    "ease": {"ease.l2": Range(1.0, 5000.0, log=True)},
    "mf": {
        "mf.learning_rate": Range(1e-3, 0.1, log=True),
        "mf.regularisation": Range(1e-6, 1e-2, log=True),
        "mf.std": Range(0.003, 0.3, log=True),
    },
    "lightgcn": _DOMAIN | {"domain.n_layers": Range(1, 4)},
    "ncf": _DOMAIN,
    "itemgcn": {
        "itemgcn.learning_rate": Range(3e-4, 1e-2, log=True),
        "itemgcn.weight_decay": Range(1e-3, 0.3, log=True),
        "itemgcn.dropout": Range(0.0, 0.6),
        "itemgcn.std": Range(0.005, 0.1, log=True),
        "itemgcn.n_layers": Range(0, 3),
        "itemgcn.text_neighbours": Range(0, 20),
    },
    "sasrec": {
        "sasrec.learning_rate": Range(3e-4, 1e-2, log=True),
        "sasrec.weight_decay": Range(1e-3, 0.3, log=True),
        "sasrec.dropout": Range(0.0, 0.6),
        "sasrec.std": Range(0.005, 0.1, log=True),
        "sasrec.n_blocks": Range(1, 3),
    },
    "text_lm": _LM,
    "ids_lm": _IDS | {"lm_alone.row_std": Range(0.005, 0.2, log=True)},
    "bdlm": _IDS
    | {
        "lm.row_std": Range(0.005, 0.2, log=True),
        "mutual.learning_rate_bridge": Range(1e-4, 1e-2, log=True),
        "mutual.domain_learning_rate": Range(3e-4, 3e-2, log=True),
        "mutual.distill_learning_rate": Range(1e-3, 0.1, log=True),
        "mutual.lm.align_item": Range(0.03, 10.0, log=True),
        "mutual.lm.kl": Range(0.0, 0.3),
        "mutual.domain.align_item": Range(0.03, 10.0, log=True),
        "mutual.domain.kl": Range(0.3, 30.0, log=True),
    },
}


def tune(config: ml_collections.ConfigDict, workdir: str, *, word: str, n_trials: int) -> dict[str, Any]:
    """Tries `n_trials` settings of one model, the config's own first, and returns what tuned.json holds.

    A second start goes on where the first stopped. What is tried next follows from config.seed and from what has been
    tried (TPE); a trial that is among the last quarter after its third phase, or a later one, ends there. A setting
    whose value in the config lies outside its range keeps it, so what is switched off stays off. Pretraining, and for
    BDLM the domain model that it starts from, are the config's own, made once. Source: Akiba et al. 2019 (Optuna).
    """
    if word not in SPACES:
        raise InputError(f"--model {word} has no search space; choose one of {', '.join(SPACES)}.")
    if n_trials < 1:
        raise InputError(f"--trials is {n_trials}; give 1 or more.")
    config, folder, began = config.copy_and_resolve_references(), Path(workdir), time.monotonic()
    config.models = (word,)
    config.runtime.store = config.runtime.store or str(folder / "stages")
    checks.check_config(config)
    own = {key: functools.reduce(lambda section, name: section[name], key.split("."), config) for key in SPACES[word]}
    own = {key: value for key, value in own.items() if SPACES[word][key].low <= value <= SPACES[word][key].high}
    with hold(folder), StopSignal() as stop:
        run = start_run(config, folder, stop)
        if not run.data.split.counts()["validation"]:
            raise InputError("tuning needs a validation part, and this data has none; choose another data.split.")
        study = _open_study(folder / word, word, config)
        decoder = functools.cache(lambda: stages.pretrain_lm(run))
        while len(done := _finished(study)) < n_trials:
            # Of the trial's own number: a study that was stopped goes on with the draws that it would have made.
            study.sampler = optuna.samplers.TPESampler(seed=(config.seed * 10_007 + len(done)) % 2**32)
            if not done:
                study.enqueue_trial(own)
            study.optimize(functools.partial(_try, run, word, tuple(own), decoder), n_trials=1)
            value = _value(_finished(study)[-1])
            _LOG.info("trial %d of %d: %s", len(done) + 1, n_trials, "pruned" if value is None else f"{value:.4f}")
    return _write(study, folder / word, config, seconds=time.monotonic() - began)


def _try(run: Run, word: str, keys: tuple[str, ...], decoder: Callable[[], Decoder], trial: optuna.Trial) -> float:
    """Trains with the trial's settings and returns the best value on validation."""
    for key in keys:
        low, high, log = SPACES[word][key]
        (trial.suggest_int if isinstance(low, int) else trial.suggest_float)(key, low, high, log=log)

    def watch(stage: str, phase: int, values: dict[str, float]) -> None:
        if stage == word:
            trial.report(sum(values.values()) / len(values), phase)
            if trial.should_prune():
                raise optuna.TrialPruned

    own = run.variant(f"{word}/trials/{trial.number}", rounded(trial.params))
    try:
        return _train(run, dataclasses.replace(own, watch=watch), word, decoder)
    except FloatingPointError as error:
        _LOG.info("%s", error)
        raise optuna.TrialPruned from None


def rounded(settings: dict[str, float]) -> dict[str, float]:
    """Three digits: what is trained is what people paste."""
    return {key: value if isinstance(value, int) else float(f"{value:.3g}") for key, value in settings.items()}


def _train(run: Run, own: Run, word: str, decoder: Callable[[], Decoder]) -> float:
    """The best value on validation under the settings of `own`; of BDLM the mean of its two arms'."""
    if word in CLOSED_FORM:
        sizes = {"n_users": run.data.n_users, "n_items": run.data.n_items}
        matrix_UI = interaction_matrix(*run.data.split.edges(TRAIN), **sizes)
        weights_II = CLOSED_FORM[word](matrix_UI, **own.config[word].to_dict())
        return stages.validate(own, scorers.closed_form_scorer(matrix_UI, weights_II))[own.config.select]
    if word in MODELS:
        return stages.train_domain(own, word).value["domain"]
    start = build.make_decoder(own, decoder().params)
    if word in ("text_lm", "ids_lm"):
        train = {"text_lm": stages.train_text_lm, "ids_lm": stages.train_ids_lm}[word]
        return train(own, start).value["lm"]
    alone = stages.train_domain(run, run.config.domain.model).params["domain"]
    taught_by = {}
    chosen = teachers.learn_together(own, start, lambda _: alone, taught_by)
    reader = taught_by["after"].read
    distilled = stages.distill_domain(own, chosen.params["lm"], chosen.params["domain"], reader=reader)
    return (chosen.value["lm"] + distilled.value["domain"]) / 2


def _open_study(folder: Path, word: str, config: ml_collections.ConfigDict) -> optuna.Study:
    """Opens the study that lies in the folder, or begins one; refuses to go on with another config."""
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.journal")))
    # Not the median: a slow start is no poor end, and eighteen of twenty trials of MF ended at once.
    pruner = optuna.pruners.PercentilePruner(75.0, n_startup_trials=4, n_warmup_steps=2)
    study = optuna.create_study(
        storage=storage, study_name=word, direction="maximize", pruner=pruner, load_if_exists=True
    )
    now = json.loads(config.to_json_best_effort())
    before = study.user_attrs.get("config", now)
    if {**before, "name": "", "runtime": {}} != {**now, "name": "", "runtime": {}}:
        raise InputError(f"{folder} holds a study of other settings; choose a new --workdir.")
    study.set_user_attr("config", now)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # killed: its settings are drawn again
    return study


def _finished(study: optuna.Study) -> list:
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return study.get_trials(deepcopy=False, states=states)


def _value(trial: optuna.trial.FrozenTrial) -> float | None:
    """None where it was pruned, of which Optuna keeps the last value that it reported."""
    return trial.value if trial.state == optuna.trial.TrialState.COMPLETE else None


def _write(study: optuna.Study, folder: Path, config, *, seconds: float) -> dict[str, Any]:
    """Writes tuned.json, and settings.txt: lines for an experiment file."""
    done = _finished(study)
    complete = [trial for trial in done if _value(trial) is not None]
    if not complete:
        raise FloatingPointError(f"no trial of {folder.name} kept a finite loss; lower the config's learning rates.")
    best = max(complete, key=lambda trial: trial.value)
    sections = {name: section for name, section in config.items() if isinstance(section, ml_collections.ConfigDict)}
    epochs = {
        f"{name}.{key}": section[key]
        for name, section in sections.items()
        for key in section
        if "epochs" in key or key in ("rounds", "ids_times")
    }
    tuned = {
        "model": folder.name,
        "select": config.select.split("/")[0] + "/cand20" if folder.name == "text_lm" else config.select,
        "value": best.value,
        "settings": rounded(best.params),
        "budget": {"trials": len(done), "pruned": len(done) - len(complete), "seed": config.seed, "epochs": epochs},
        "seconds_of_last_start": round(seconds),
        "trials": [{"value": _value(trial), "settings": rounded(trial.params)} for trial in done],
    }
    write_json(folder / "tuned.json", tuned)
    lines = [f"    c.{key} = {value!r}\n" for key, value in tuned["settings"].items()]
    (folder / "settings.txt").write_text("".join(lines), encoding="utf-8")
    return tuned
