"""What the stages of a run are made of: domain models over their interactions, params, and the compiled arms.

`stages` says what is trained and in which order.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bdlm_jax.data.splits import TEST, TRAIN, check_training_edges, merge_validation
from bdlm_jax.data.text_vectors import text_vectors
from bdlm_jax.domain import models, negatives
from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.lm import causal_lm, hf_weights, lora
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.packing import Packed
from bdlm_jax.mutual import domain_epoch, lm_step, sharing
from bdlm_jax.mutual.optimizer import make_optimizer, make_schedule
from bdlm_jax.mutual.options import DomainWeights, LMWeights, Meeting
from bdlm_jax.run import guards, prepare, store, trained, work
from bdlm_jax.run.prepare import Data, Texts
from bdlm_jax.run.ranked import KNOWN, PARTS
from bdlm_jax.runtime import parallel
from bdlm_jax.runtime.fit import Arm, Fitted, Phase, best_phases, fit
from bdlm_jax.types import LeakError, Params, leaf_name

FRESH_STD = 0.02  # of the text rows of `causal_lm.init_lm`
DOT_ARM = models.make_arm("mf", Inputs(width=1), {})  # stands in where no domain model takes part


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What the stages of one run share; what follows from it is computed once."""

    config: ml_collections.ConfigDict
    folder: Path
    data: Data
    texts: Texts
    stop: Any
    key: jax.Array
    root: Path  # the run directory, of which `folder` may be a part
    first: "Run | None" = None  # of a refit: the run that chose on validation
    watch: Callable[[str, int, dict[str, float]], None] | None = None  # told the stage, and what `fit` tells
    begin: Callable[[str, Path, Sequence[Phase]], None] | None = None  # told a stage's name, where it lies, its phases

    @functools.cached_property
    def lm(self) -> LMConfig:
        """The decoder's shape, in the vocabulary's number of text rows."""
        return prepare.lm_shape(self.config, self.texts.vocabulary.n_text)

    @functools.cached_property
    def warm_I(self) -> np.ndarray:
        """Items with a training interaction."""
        return self.data.split.degree(TRAIN) > 0

    @functools.cached_property
    def content_IC(self) -> np.ndarray:
        """What the items' texts say (`data.text_vectors`)."""
        return text_vectors(self.data.item_texts, width=self.config.mutual.text_width)

    @functools.cached_property
    def arms(self) -> dict[tuple, DomainArm]:
        """Of `make_arm`: what is compiled for a domain model is found again by the very same arm."""
        return {}

    def stage_key(self, name: str) -> jax.Array:
        """A key of its own for each stage, whatever stages run before it."""
        return jax.random.fold_in(self.key, sum(ord(c) * 131**i for i, c in enumerate(name)) % (2**31))

    def variant(self, word: str, overrides: dict[str, Any]) -> "Run":
        """The same data and words under other settings; its stages lie in a folder of its own."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(overrides)
        first = self.first and self.first.variant(word, overrides)
        return dataclasses.replace(self, config=config, folder=self.folder / word, first=first)

    @functools.cached_property
    def final(self) -> "Run":
        """What is tested: this run, or with `data.refit` "validation" one that trains on that part too.

        There every stage lasts as long as was chosen on validation here, and nothing is chosen.
        """
        if self.config.data.refit == "none" or self.first:
            return self
        data = self.data._replace(split=merge_validation(self.data.split))
        return dataclasses.replace(self, data=data, folder=self.folder / "refit", first=self)

    def fit(self, stage: str, *, phases: list[Phase], parents: Any, **arguments) -> Fitted:
        """Trains a stage in the run directory, or in `runtime.store`, where another run may have trained the same.

        `parents` is all that it takes from other stages: a tree of arrays, by whose content it is found again.
        """
        runtime = self.config.runtime
        facts = {"parents": parents, "phases": [(phase.arm, phase.units) for phase in phases]}
        if self.first and "keep" not in arguments:
            chosen = {arm: best["phase"] for arm, best in best_phases(self.first.folder / stage).items()}
            phases = phases[: max(chosen.values()) + 1]
            arguments |= {"keep": chosen, "validate": None}
        choice = "keep" if "keep" in arguments else "select"
        facts[choice] = arguments[choice]
        inputs = functools.partial(store.stage_inputs, self.config, self.data, self.texts, stage, **facts)
        with store.stage_folder(runtime.store, self.folder / stage, inputs, stop=self.stop) as folder:
            if self.begin:
                self.begin((self.folder / stage).relative_to(self.root).as_posix(), folder, phases)
            return fit(
                folder,
                phases=phases,
                stage=stage,
                key=self.stage_key(stage),
                watch=self.watch and functools.partial(self.watch, stage),
                stop=self.stop,
                checkpoint_seconds=runtime.checkpoint_seconds,
                tracker=runtime.log,
                **arguments,
            )


class Decoder(NamedTuple):
    """Where every LM stage starts: the params (None: drawn anew by each), and the standard deviation of <iid> rows."""

    params: Params | None
    row_std: float


class Tables(NamedTuple):
    """{"shared", "domain"} params, and standard deviations over items with interactions.

    `read_std` is that of the rows that the LM reads, `out_std` that of the domain arm's representations.
    """

    params: Params
    read_std: float
    out_std: float


def start_run(config: ml_collections.ConfigDict, folder: Path, stop=None) -> Run:
    """Makes data, candidates and words of a run, or reads those that an earlier start has made."""
    data = prepare.prepare_data(config, folder / "data")
    vocabulary = prepare.prepare_vocabulary(config, data, folder / "tokenizer")
    texts = prepare.encode_texts(config, data, vocabulary)
    return Run(config, folder, data, texts, stop, jax.random.key(config.seed), root=folder)


def make_meeting(run: Run, *, reads: str) -> Meeting:
    """The static facts of how the arms meet."""
    m, p = run.config.mutual, run.config.prompts
    shown = p.user_dropout < 1 or p.read_named
    return Meeting(run.lm, reads=reads, align=m.align, temperature=m.temperature, shows_users=shown)


def make_arm(run: Run, model: str, *, parts: tuple[int, ...] = KNOWN["validation"]) -> DomainArm:
    """Builds a domain model over the interactions of some parts, never over the test's."""
    if (model, parts) not in run.arms:
        data = run.data
        user_E, item_E = data.split.edges(*parts)
        check_training_edges(data.split, user_E, item_E, allowed=[part for part in parts if part != TEST])
        inputs = Inputs(run.config.shared.width, data.n_users, data.n_items, user_E, item_E, content(run, model))
        run.arms[model, parts] = models.make_arm(model, inputs, prepare.domain_settings(run.config, model))
    return run.arms[model, parts]


def content(run: Run, model: str) -> np.ndarray | None:
    """What the items' texts say, for a model that joins items by them."""
    return run.content_IC if prepare.domain_settings(run.config, model).get("text_neighbours") else None


def parts_at_test(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """The parts over whose interactions a domain model stands at test time."""
    return KNOWN["test" if config.domain.test_graph == "train+validation" else "validation"]


def init_tables(
    run: Run, stage: str, arm: DomainArm, *, trained: Params | None = None, std: float | None = None
) -> Params:
    """Draws {"shared", "domain"}, or takes over a trained domain model's, as `shared.initial` says.

    "domain" takes its tables, "propagated" its representations in their place, "random" neither; `std` is by
    default `shared.std`.
    """
    shared_key, domain_key, *_ = _init_keys(run, stage)
    c, sizes = run.config.shared, {"n_users": run.data.n_users, "n_items": run.data.n_items}
    shared, domain = sharing.init_shared(shared_key, **sizes, width=c.width, std=std or c.std), arm.init(domain_key)
    if trained:
        domain = trained.get("domain", domain)
        if c.initial == "domain":
            shared = trained["shared"]
        elif c.initial == "propagated":
            shared = dict(zip(("user", "item"), arm.encode(trained["shared"], domain)))
    return {"shared": shared, "domain": domain}


def measure_tables(run: Run, arm: DomainArm, params: Params, *, reads: str) -> Tables:
    """Measures the tables with which an LM stage starts; no decoder is needed for it."""
    found = {}
    for way in {reads, "propagated"}:
        item_ID = sharing.read_tables(params["shared"], params["domain"], encode=arm.encode, reads=way)[1]
        found[way] = float(jnp.std(item_ID[run.warm_I]))
    return Tables(params, read_std=found[reads], out_std=found["propagated"])


def load_decoder(run: Run) -> Params | None:
    """Loads the decoder of `lm.path` in the vocabulary's number of rows; None where no path is given.

    On a mesh that cuts weights each part goes to its own device: loading puts the whole model neither on one device nor
    on the host.
    """
    c = run.config.lm
    if not c.path:
        return None
    named = {leaf_name(path): place for path, place in jax.tree_util.tree_leaves_with_path(_decoder_shardings(run))}
    placement = named.__getitem__ if named else None
    return hf_weights.load_lm(prepare.own_folder(c.path), run.lm, dtype=c.param_dtype, placement=placement)


def make_decoder(run: Run, params: Params | None, *, row_std: float | None = None) -> Decoder:
    """Notes how large <iid> rows shall be as the LM first reads them: `row_std`, or with 0 as large as text rows.

    The bridge keeps the norm of a row up to its gain, so the mean norm of the text rows is what is matched; a row of D
    entries of this standard deviation has it (ours). Without `row_std` it is `lm.row_std`.
    """
    if row_std := run.config.lm.row_std if row_std is None else row_std:
        return Decoder(params, row_std)
    norm = FRESH_STD * run.lm.width**0.5
    if params is not None:
        rows_VM = jnp.asarray(params["embedding"][: len(run.texts.vocabulary.tokenizer)], jnp.float32)
        norm = float(jnp.mean(jnp.linalg.norm(rows_VM, axis=1)))
    scale = run.lm.width**0.5 if run.lm.scale_embedding else 1.0
    return Decoder(params, scale * norm / min(run.config.shared.width, run.lm.width) ** 0.5)


def init_params(run: Run, stage: str, tables: Tables, decoder: Decoder, *, trains: str | None = None) -> Params:
    """Makes the whole tree: the tables, the decoder (drawn where there is none yet), adapters and the bridge."""
    c, lm = run.config.lm, decoder.params
    *_, lm_key, bridge_key = _init_keys(run, stage)
    if lm is None:
        init, places = functools.partial(causal_lm.init_lm, config=run.lm), _decoder_shardings(run)
        lm = (init if places is None else jax.jit(init, out_shardings=places))(lm_key)
    if c.param_dtype != "float32":
        own = {name: value for name, value in lm.items() if name not in lora.NOT_DECODER}
        lm = {**lm, **jax.tree.map(lambda leaf: leaf.astype(c.param_dtype), own)}
    if (trains or c.trains) == "lora" and lora.LORA not in lm:
        options = {"rank": c.lora_rank, "targets": c.lora_targets, "alpha": c.lora_alpha}
        lm = {**lm, lora.LORA: lora.init_lora(jax.random.fold_in(lm_key, 1), lm, **options)}
    gain = decoder.row_std / tables.read_std
    sizes = {"width": run.config.shared.width, "lm_width": run.lm.width}
    bridge = sharing.init_bridge(bridge_key, **sizes, gain=gain, out_std=tables.out_std)
    return {**tables.params, "lm": {**lm, "bridge": bridge}}


def make_lm_arm(
    run: Run,
    rows: Packed | None,
    meeting: Meeting,
    weights: LMWeights,
    rates: dict,
    *,
    arm: DomainArm = DOT_ARM,
    trains: str | None = None,
) -> Arm:
    """Builds the LM arm: its compiled step, its batches, and which parameters move.

    Args:
      rates: of `rates.lm_rates`.
      arm: the domain arm, where the LM reads or hears it.
      trains: default `lm.trains`.
    """
    config, c, vocabulary = run.config, run.config.lm, run.texts.vocabulary
    softmax_items = prepare.drawn_items(c.softmax_items, run.data.n_items, told="the LM" if weights.item else "")
    trains = trains or c.trains
    train_user, apart = trained.reaches_users(config, arm, reads=meeting.reads), trained.rows_apart(config, trains)
    rules = trained.lm_rules(trains, train_shared="shared" in rates, train_user=train_user, rows_apart=apart)
    groups = {name: {"learning_rate": rate} for name, rate in rates.items()}
    for name in ("lm", "bridge"):
        groups[name]["weight_decay"] = c.weight_decay
    groups["lm"]["kind"] = c.optimizer
    if trains == "full" and c.param_dtype != "float32":
        groups["lm"]["master"] = c.master_weights
    if apart:
        groups["text_rows"] = {**groups["lm"], "learning_rate": lambda step: c.text_row_rate * rates["lm"](step)}
    optimizer = make_optimizer(rules=rules, groups=groups, clip_norm=c.clip_norm)
    step = lm_step.make_lm_step(
        arm=arm, meeting=meeting, weights=weights, optimizer=optimizer, accumulate=c.accumulate,
        rules=None if trains == "full" and train_user else rules, softmax_items=softmax_items,
        skip_text=bool(weights.item) and config.parallel == "jit",
    )  # fmt: skip
    constants = {"warm_I": jnp.asarray(run.warm_I)} | ({"known": _known(run, (TRAIN,))} if weights.kl else {})
    if softmax_items:
        constants["warm_item_W"] = jnp.asarray(np.flatnonzero(run.warm_I))

    def batch(number):
        return rows.batch(
            number,
            batch_size=c.batch_rows,
            seed=config.seed,
            max_text_targets=c.max_text_targets,
            uid_dropout=config.prompts.user_dropout,
            user_tokens=vocabulary.user_tokens,
            unnamed_user=vocabulary.unnamed_user,
        )

    def rates_of(batch, seconds):
        how = {"weights": weights, "trains": trains, "n_logits": softmax_items or run.data.n_items}
        how |= {"item_width": run.config.shared.width, "adapters": _adapters(run) if trains == "lora" else 0}
        flops = work.step_flops(run.lm, batch, **how)["model"]
        return work.step_rates(flops, batch["tokens"].size, seconds, n_devices=_devices(run))

    return Arm(_compile(run, step), optimizer, batch, view=_nothing, constants=constants, rates=rates_of)


def make_domain_arm(
    run: Run,
    model: str,
    arm: DomainArm,
    meeting: Meeting | None,
    weights: DomainWeights,
    *,
    rate: float,
    epochs: int | None = None,
    train_shared: bool = True,
    part: str = "validation",
) -> Arm:
    """Builds the domain arm: its compiled epoch over the training interactions, and which parameters move.

    `meeting` is None for an arm that trains alone. What is known when `part` is predicted is left out of the
    score-level term as seen, and is all that the domain model may have been built over. Where the model's settings
    have a schedule, the rate follows it over the `epochs`.
    """
    data, m, c = run.data, run.config.mutual, functools.partial(prepare.training_setting, run.config, model)
    for (name, parts), made in run.arms.items():
        if made is arm and not set(parts) <= set(range(PARTS[part])):
            raise LeakError(f"{name} was built over {part} interactions or later ones, which it is to predict.")
    user_E, item_E = data.split.edges(TRAIN)
    sizes = {"n_users": data.n_users, "n_items": data.n_items}
    constants = domain_epoch.make_epoch_constants(user_E, item_E, **sizes, popularity=c("popularity"))
    if arm.windows:
        constants["window_WL"] = jnp.asarray(arm.windows(*data.split.histories(TRAIN)))
    guards.check_epoch(data.split, constants)
    if weights.kl:
        constants["known"] = _known(run, KNOWN[part])
    n = _devices(run)  # small data must still divide over them
    n_rows = len(constants.get("window_WL", user_E))
    batch_size = min(c("batch_size"), -(-n_rows // n) * n)
    if epochs and c("schedule"):
        steps = epochs * -(-n_rows // batch_size)
        rate = make_schedule(c("schedule"), rate, warmup=min(c("warmup_steps"), steps // 2), steps=steps)
    rules = trained.domain_rules(arm, train_shared=train_shared)
    groups = {"domain": {"learning_rate": rate, "weight_decay": c("weight_decay") or 0.0}}
    optimizer = make_optimizer(rules=rules, groups=groups)
    step = domain_epoch.make_domain_step(arm=arm, meeting=meeting, weights=weights, optimizer=optimizer, rules=rules)
    kl_users = min(m.kl_users, data.n_users // n * n) if weights.kl or weights.align_user else 0
    if arm.windows:  # a batch of few users, and so many steps: it hears the LM of as many as it learns from
        kl_users = min(kl_users, batch_size)
    kl_items = m.kl_items if weights.kl else 0
    softmax_items = prepare.drawn_items(c("softmax_items") or 0, data.n_items, told=model) if arm.windows else 0
    drawn = {"kl_users": kl_users, "kl_items": kl_items, "softmax_items": softmax_items}
    epoch = domain_epoch.make_domain_epoch(step, batch_size=batch_size, **drawn)
    slots = domain_epoch.make_slots(batch_size=batch_size, kl_users=kl_users)
    return Arm(_compile(run, epoch), optimizer, lambda number: slots, view=_nothing, constants=constants)


def _nothing(params: Params) -> Params:
    return {}


def _init_keys(run: Run, stage: str) -> jax.Array:
    return jax.random.split(run.stage_key(stage + "/init"), 4)  # shared tables, domain model, decoder, bridge


def _compile(run: Run, step) -> parallel.Compiled:
    return parallel.compile_step(step, parallel=run.config.parallel, mesh=run.config.mesh.to_dict())


def _devices(run: Run) -> int:
    return 1 if run.config.parallel == "jit" else parallel.device_count()


def _adapters(run: Run) -> int:
    """The number of weights in the adapters of the layers."""
    c, key = run.config.lm, jax.random.key(0)
    options = {"rank": c.lora_rank, "targets": c.lora_targets, "alpha": c.lora_alpha}
    made = jax.eval_shape(lambda: lora.init_lora(key, causal_lm.init_lm(key, config=run.lm), **options))
    return sum(leaf.size for leaf in jax.tree.leaves(made.get(lora.BESIDE, {})))


def _decoder_shardings(run: Run):
    shapes = {"lm": jax.eval_shape(functools.partial(causal_lm.init_lm, config=run.lm), jax.random.key(0))}
    found = parallel.params_shardings(shapes, parallel=run.config.parallel, mesh=run.config.mesh.to_dict())
    return found and found["lm"]


def _known(run: Run, parts) -> negatives.Seen:
    sizes = {"n_users": run.data.n_users, "n_items": run.data.n_items}
    return negatives.make_seen(*run.data.split.edges(*parts), **sizes, negatives=False)
