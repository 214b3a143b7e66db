"""How a run's config becomes models and arms: the decoder's shape, the domain model over its graph, params, steps.

`stages` says what is trained and in which order; this is what it is made of.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bdlm_jax.data.splits import TRAIN, check_training_edges, seen_mask
from bdlm_jax.domain import models
from bdlm_jax.domain.arm import DomainArm, Inputs
from bdlm_jax.lm import causal_lm, lora
from bdlm_jax.lm import hf_config as families
from bdlm_jax.lm import hf_weights as huggingface
from bdlm_jax.mutual import domain_epoch, lm_step, sharing
from bdlm_jax.mutual import optimizer as optimizers
from bdlm_jax.mutual.options import Bridge, DomainWeights, LMWeights
from bdlm_jax.run import rows as lm_rows
from bdlm_jax.run.prepare import KNOWN, Data
from bdlm_jax.runtime import parallel
from bdlm_jax.runtime.fit import Arm, Fitted, fit
from bdlm_jax.types import InputError, Params, leaf_name


class Run(NamedTuple):
    """What the stages of one run share."""

    config: ml_collections.ConfigDict
    folder: Path
    data: Data
    texts: lm_rows.Texts
    stop: Any
    key: jax.Array

    def stage_key(self, name: str) -> jax.Array:
        """A key of its own for each stage, whatever stages run before it."""
        return jax.random.fold_in(self.key, sum(ord(c) * 131**i for i, c in enumerate(name)) % (2**31))

    def fit(self, stage: str, **arguments) -> Fitted:
        runtime = self.config.runtime
        return fit(
            self.folder / stage,
            stage=stage,
            key=self.stage_key(stage),
            stop=self.stop,
            checkpoint_seconds=runtime.checkpoint_seconds,
            tensorboard=None if runtime.tensorboard else False,
            **arguments,
        )


FRESH_STD = 0.02  # of the text rows of `causal_lm.init_lm`
DOT_ARM = models.make_arm("mf", Inputs(width=1), {})  # stands in where no domain model takes part


def lm_config(run: Run) -> causal_lm.LMConfig:
    """The decoder's shape from the config (its own words, or a config.json's) and the vocabulary."""
    c = run.config.lm
    if c.path or c.config:
        return dataclasses.replace(own_lm_config(run.config), vocab_size=run.texts.vocabulary.n_text)
    return causal_lm.LMConfig(
        vocab_size=run.texts.vocabulary.n_text,
        width=c.width,
        n_layers=c.n_layers,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads,
        mlp_width=c.mlp_width,
        tie_embeddings=c.tie_embeddings,
        dtype=c.dtype,
        dropout=c.dropout,
        **_how_to_compute(c),
    )


def own_lm_config(config: ml_collections.ConfigDict) -> causal_lm.LMConfig:
    """The decoder's shape as the config.json of `lm.path` or `lm.config` gives it, in its own number of text rows."""
    c = config.lm
    source = own_folder(c.path) if c.path else _read_config_json(c.config)
    return families.lm_config_from_hf(source, dtype=c.dtype, dropout=c.dropout, **_how_to_compute(c))


def _how_to_compute(c) -> dict:
    return {"remat": c.remat and (c.remat_keeps if c.remat_keeps == "dots" else True), "attention": c.attention}


@functools.cache
def own_folder(path: str) -> Path:
    """The local folder of `lm.path`; the hub is asked once."""
    return huggingface.find_folder(path)


def _read_config_json(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"config.lm.config: {path} cannot be read ({error}); give a config.json.") from error


def make_bridge(run: Run, *, reads: str) -> Bridge:
    """The static facts of how the arms meet."""
    m = run.config.mutual
    return Bridge(
        lm=lm_config(run),
        reads=reads,
        align=m.align,
        temperature=m.temperature,
    )


def make_arm(run: Run, model: str, *, parts: tuple[int, ...] = (TRAIN,)) -> DomainArm:
    """Builds a domain model over the interactions of some parts (training: TRAIN alone, which is checked)."""
    data, c = run.data, run.config.domain
    user_E, item_E = data.split.edges(*parts)
    check_training_edges(data.split, user_E, item_E, allowed=parts)
    inputs = Inputs(run.config.shared.width, data.n_users, data.n_items, user_E, item_E)
    settings = {name: c[name] for name in ("n_layers", "layer_weights", "backend")}
    settings |= {"length": run.config.prompts.max_items, **(c.get("options", {}) if model == c.model else {})}
    return models.make_arm(model, inputs, settings)


def make_test_arm(run: Run) -> DomainArm:
    """The domain model as it stands at test time: propagated over what may be known then."""
    parts = KNOWN["test"] if run.config.domain.test_graph == "train+validation" else KNOWN["validation"]
    return make_arm(run, run.config.domain.model, parts=parts)


def init_domain_params(run: Run, arm: DomainArm, stage: str) -> Params:
    """Draws {"shared", "domain"} for a domain model that trains alone."""
    shared_key, domain_key = jax.random.split(run.stage_key(stage + "/init"))
    shared = sharing.init_shared(shared_key, **_tables_shape(run), std=run.config.shared.std)
    return {"shared": shared, "domain": arm.init(domain_key)}


def load_weights(run: Run) -> Params | None:
    """Loads the decoder of `lm.path` in the vocabulary's number of rows; None where no path is given.

    On a mesh that cuts weights each part goes to its own device: loading puts the whole model neither on one device nor
    on the host.
    """
    c = run.config.lm
    if not c.path:
        return None
    named = {leaf_name(path): place for path, place in jax.tree_util.tree_leaves_with_path(_decoder_shardings(run))}
    placement = named.__getitem__ if named else None
    return huggingface.load_lm(own_folder(c.path), lm_config(run), dtype=c.param_dtype, placement=placement)


def _init_decoder(key, run: Run) -> Params:
    """As `load_weights`, drawn."""
    init = functools.partial(causal_lm.init_lm, config=lm_config(run))
    shardings = _decoder_shardings(run)
    return init(key) if shardings is None else jax.jit(init, out_shardings=shardings)(key)


def _decoder_shardings(run: Run):
    shapes = {"lm": jax.eval_shape(functools.partial(causal_lm.init_lm, config=lm_config(run)), jax.random.key(0))}
    found = parallel.params_shardings(shapes, parallel=run.config.parallel, mesh=run.config.mesh.to_dict())
    return found and found["lm"]


def init_params(
    run: Run, arm, stage: str, *, reads: str, pretrained=None, domain_params=None, trains: str | None = None
) -> Params:
    """Makes the whole tree: tables and domain params from the trained domain model, the LM from `pretrained`.

    `trains` as in `make_lm_arm`: "lora" puts adapters beside a decoder that has none yet.
    """
    keys = jax.random.split(run.stage_key(stage + "/init"), 4)
    shared = sharing.init_shared(keys[0], **_tables_shape(run), std=run.config.shared.std)
    domain = arm.init(keys[1])
    if domain_params is not None:
        domain = domain_params.get("domain", domain)
        if run.config.shared.initial == "domain":
            shared = domain_params["shared"]
    c, shape = run.config.lm, lm_config(run)
    lm = pretrained if pretrained is not None else _init_decoder(keys[2], run)
    if c.param_dtype != "float32":
        narrow = lambda tree: jax.tree.map(lambda leaf: leaf.astype(c.param_dtype), tree)  # noqa: E731
        lm = {name: value if name in lora.NOT_DECODER else narrow(value) for name, value in lm.items()}
    if (trains or c.trains) == "lora" and lora.LORA not in lm:
        options = {"rank": c.lora_rank, "targets": c.lora_targets, "alpha": c.lora_alpha}
        lm = {**lm, lora.LORA: lora.init_lora(jax.random.fold_in(keys[2], 1), lm, **options)}
    gain = row_std(run, pretrained) / table_std(run, shared, domain, arm, reads)
    bridge = sharing.init_bridge(
        keys[3], width=run.config.shared.width, lm_width=shape.width, gain=gain,
        out_std=table_std(run, shared, domain, arm, "propagated"),
    )  # fmt: skip
    return {
        "shared": shared,
        "domain": domain,
        "lm": {**{k: v for k, v in lm.items() if k != "bridge"}, "bridge": bridge},
    }


def table_std(run: Run, shared, domain, arm, reads: str) -> float:
    """Standard deviation of the rows that the LM reads of items with interactions."""
    _, item_ID = sharing.read_tables(shared, domain, encode=arm.encode, reads=reads)
    return float(jnp.std(item_ID[jnp.asarray(warm_items(run.data))]))


def row_std(run: Run, pretrained: Params | None) -> float:
    """Standard deviation of the <iid> rows as the LM first reads them: `lm.row_std`, or with 0 the text rows' own size.

    The bridge keeps the norm of a row up to its gain, so the mean norm of the text rows is what is matched; a row of D
    entries of this standard deviation has it (ours).
    """
    if run.config.lm.row_std:
        return run.config.lm.row_std
    shape = lm_config(run)
    norm = FRESH_STD * shape.width**0.5
    if pretrained is not None:
        rows_VM = jnp.asarray(pretrained["embedding"][: len(run.texts.vocabulary.tokenizer)], jnp.float32)
        norm = float(jnp.mean(jnp.linalg.norm(rows_VM, axis=1)))
    scale = shape.width**0.5 if shape.scale_embedding else 1.0
    return scale * norm / min(run.config.shared.width, shape.width) ** 0.5


def _tables_shape(run: Run) -> dict:
    return {"n_users": run.data.n_users, "n_items": run.data.n_items, "width": run.config.shared.width}


def warm_items(data: Data) -> np.ndarray:
    """(I,) bool: items with a training interaction."""
    return data.split.degree(TRAIN) > 0


def lm_rules(trains: str, *, train_shared: bool) -> optimizers.Rules:
    """Returns the optimiser's groups in the LM's phases: what `trains` says of "lm", then "bridge" and "shared".

    Args:
      trains: "full" (the decoder), "lora" (its adapters) or "bridge" (neither); the bridge trains in all three.
      train_shared: whether the shared tables do.
    """
    frozen = optimizers.FROZEN
    return [
        (r"shared/.*", "shared" if train_shared else frozen),
        (r"domain/.*", frozen),
        (r"lm/bridge/.*", "bridge"),
        (r"lm/lora/alpha", frozen),
        (r"lm/lora/.*", "lm" if trains == "lora" else frozen),
        (r"lm/.*", "lm" if trains == "full" else frozen),
    ]


def make_lm_arm(
    run: Run,
    rows,
    bridge: Bridge,
    weights: LMWeights,
    *,
    arm: DomainArm = DOT_ARM,
    rate,
    rows_std: float | None = None,
    row_std: float | None = None,
    trains: str | None = None,
    bridge_rate: float | None = None,
    user_dropout: float | None = None,
    train_shared: bool = True,
    view=lambda params: {},
    finish=lambda params: params,
) -> Arm:
    """Builds the LM arm: its step, its batches, and which parameters move.

    Args:
      run: the run.
      rows: packed training rows.
      bridge: static facts of the model.
      weights: loss weights.
      arm: the domain arm, where the LM reads or hears it.
      rate: the learning-rate schedule.
      rows_std: standard deviation of the table's rows as the LM reads them at the start (default: a fresh table's).
      row_std: standard deviation of the <iid> rows as the LM reads them (default: `lm.row_std`).
      trains: "full", "lora" (adapters, bridge and tables) or "bridge" (bridge and tables); default `lm.trains`.
      bridge_rate: the bridge's learning rate at its peak (default: the LM's).
      user_dropout: how often <user> stands in for <uid> (default: `prompts.user_dropout`).
      train_shared: whether the LM's steps move the shared tables.
      view: see `fit.Arm`.
      finish: see `fit.Arm`.
    """
    config = run.config
    rows_std = rows_std or config.shared.std
    c, vocabulary = config.lm, run.texts.vocabulary
    row_std, trains = row_std or c.row_std, trains or c.trains
    rules = lm_rules(trains, train_shared=bool(train_shared and weights.item))
    # The bridge shrinks or stretches the tables to the LM's scale; their step is stretched back, so that a row moves as
    # fast as one of an LM with its own table would.
    scale = c.learning_rate_shared / c.learning_rate * rows_std / row_std
    if bridge.reads == "propagated":
        scale *= config.domain.n_layers + 1  # a row answers to its own layer 0 by that share only
    master = c.master_weights if trains == "full" and c.param_dtype != "float32" else None
    groups = {
        "lm": {"learning_rate": rate, "weight_decay": c.weight_decay, "kind": c.optimizer, "master": master},
        "bridge": {
            "learning_rate": lambda step: (bridge_rate or c.learning_rate) / c.learning_rate * rate(step),
            "weight_decay": c.weight_decay,
        },
        "shared": {"learning_rate": lambda step: scale * rate(step)},
    }
    optimizer = optimizers.make_optimizer(rules=rules, groups=groups, clip_norm=c.clip_norm)
    step = lm_step.make_lm_step(
        arm=arm, bridge=bridge, weights=weights, optimizer=optimizer,
        rules=None if trains == "full" else rules, accumulate=c.accumulate,
    )  # fmt: skip
    compiled = parallel.compile_step(step, parallel=config.parallel, mesh=config.mesh.to_dict())
    constants = {"warm_I": jnp.asarray(warm_items(run.data))}
    if weights.kl:
        constants["seen_UI"] = _seen(run, (TRAIN,))

    def batch(number):
        return rows.batch(
            number,
            batch_size=c.batch_rows,
            seed=config.seed,
            max_text_targets=c.max_text_targets,
            uid_dropout=config.prompts.user_dropout if user_dropout is None else user_dropout,
            user_tokens=vocabulary.user_tokens,
            unnamed_user=vocabulary.unnamed_user,
        )

    return Arm(compiled=compiled, optimizer=optimizer, batch=batch, view=view, constants=constants, finish=finish)


def make_domain_arm(
    run: Run,
    arm: DomainArm,
    bridge: Bridge | None,
    weights: DomainWeights,
    *,
    rate: float,
    view,
    train_shared: bool = True,
    parts: tuple[int, ...] = (TRAIN,),
) -> Arm:
    """Builds the domain arm: its compiled epoch over the training interactions, and which parameters move.

    Args:
      run: the run.
      arm: the domain model.
      bridge: static facts of the model, None for an arm that trains alone.
      weights: loss weights.
      rate: the learning rate.
      view: see `fit.Arm`.
      train_shared: whether its steps move the shared tables.
      parts: whose items the score-level term leaves out as seen.
    """
    config, data = run.config, run.data
    c, m = config.domain, config.mutual
    user_E, item_E = data.split.edges(TRAIN)
    n = 1 if config.parallel == "jit" else jax.device_count()  # small data must still divide over the devices
    kl_users = min(m.kl_users, data.n_users // n * n) if weights.kl or weights.align_user else 0
    constants = domain_epoch.make_epoch_constants(
        user_E, item_E, n_users=data.n_users, n_items=data.n_items, popularity=c.popularity
    )
    if weights.kl:
        constants["seen_UI"] = _seen(run, parts)
    rules = [
        (r"shared/.*", "domain" if train_shared else optimizers.FROZEN),
        (r"domain/.*", "domain"),
        (r"lm/.*", optimizers.FROZEN),
    ]
    optimizer = optimizers.make_optimizer(rules=rules, groups={"domain": {"learning_rate": rate}})
    step = domain_epoch.make_domain_step(arm=arm, bridge=bridge, weights=weights, optimizer=optimizer, rules=rules)
    batch_size = min(c.batch_size, -(-len(user_E) // n) * n)
    epoch = domain_epoch.make_domain_epoch(
        step, batch_size=batch_size, kl_users=kl_users, kl_items=m.kl_items if weights.kl else 0
    )
    compiled = parallel.compile_step(epoch, parallel=config.parallel, mesh=config.mesh.to_dict())
    slots = domain_epoch.make_slots(batch_size=batch_size, kl_users=kl_users)
    return Arm(compiled=compiled, optimizer=optimizer, batch=lambda number: slots, view=view, constants=constants)


def _seen(run: Run, parts) -> jax.Array:
    everyone = np.arange(run.data.n_users)
    return jnp.asarray(seen_mask(run.data.split.histories(*parts), everyone, run.data.n_items))
