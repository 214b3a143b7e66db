"""A general language model from text alone: a tokenizer, then a Llama-shaped decoder, as a Hugging Face directory.

It stands in for a public model where none is at hand: `lm.path` takes it as it takes any other. Training can be killed
at any moment; what it needs to go on lies in OUT.training until the directory stands.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax import __version__
from bdlm_jax.data.corpus import read_documents
from bdlm_jax.evaluation.perplexity import perplexity
from bdlm_jax.lm.causal_lm import init_lm
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.hf_folder import write_hf_folder
from bdlm_jax.lm.packing import Packed
from bdlm_jax.lm.vocabulary import Vocabulary, load_tokenizer, save_tokenizer, train_tokenizer
from bdlm_jax.mutual import lm_step, sharing
from bdlm_jax.mutual.optimizer import FROZEN, make_optimizer, make_schedule
from bdlm_jax.mutual.options import LMWeights, Meeting
from bdlm_jax.run.build import DOT_ARM
from bdlm_jax.run.rows import text_rows
from bdlm_jax.run.workdir import hold
from bdlm_jax.runtime import checkpoint, parallel
from bdlm_jax.runtime.files import replacing, write_json
from bdlm_jax.runtime.fit import Arm, Fitted, Phase, fit
from bdlm_jax.runtime.log import StopSignal
from bdlm_jax.types import InputError

_LOG = logging.getLogger(__name__)
FACTS = "pretrain.json"  # in the directory: how it was trained, and what it reached
_MOST_HELD_OUT = 2000  # documents
_WARMUP = 0.02  # of the steps
_RULES = [(r"lm/bridge/.*", FROZEN), (r"lm/.*", "lm"), (r".*", FROZEN)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the model is and how it trains; the defaults make 24 million parameters."""

    vocab_size: int = 8192
    width: int = 512
    layers: int = 7
    heads: int = 8
    kv_heads: int = 4
    mlp_width: int = 0  # 0: 8/3 of the width, which gives a gated MLP the parameters of a plain one of 4
    length: int = 256  # tokens of a row, and the longest that the model is made for
    epochs: int = 3
    batch_rows: int = 16
    learning_rate: float = 0.0  # 0: 3e-3 up to a width of 128, beyond it by one over the width (ours)
    weight_decay: float = 0.1
    dropout: float = 0.0
    held_out: float = 0.02  # share of the documents that the perplexity is measured on
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self):
        whole = ("vocab_size", "width", "layers", "heads", "kv_heads", "length", "epochs", "batch_rows")
        for name in whole:
            most = 1_000 if name == "layers" else 2**31
            if not 1 <= getattr(self, name) < most:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least 1 and below {most:,d}.")
        for name, most in (("weight_decay", 1.0), ("dropout", 1.0), ("learning_rate", 1.0), ("held_out", 0.5)):
            if not 0 <= getattr(self, name) < most:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least 0 and below {most:g}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed is {self.seed}; it must be at least 0 and below 2**32.")
        if self.length < 8:
            raise InputError(f"--length is {self.length}; a row needs at least 8 tokens.")

    def shape(self, n_text: int) -> LMConfig:
        """The decoder's options, in a vocabulary's number of text rows."""
        return LMConfig(
            vocab_size=n_text, width=self.width, n_layers=self.layers, n_heads=self.heads, n_kv_heads=self.kv_heads,
            mlp_width=self.mlp_width or -(-self.width * 8 // 3 // 8) * 8, max_positions=self.length, dtype=self.dtype,
            dropout=self.dropout,
        )  # fmt: skip

    @property
    def rate(self) -> float:
        return self.learning_rate or 3e-3 * min(1.0, 128 / self.width)


def pretrain(corpus: Sequence[str], out: str | os.PathLike, settings: Settings) -> dict:
    """Trains a model on documents and writes it to `out`; returns its facts, as pretrain.json there holds them.

    The weights are those of the epoch with the best perplexity on the documents held out. Of a finished directory of
    the same settings and text only the facts are read; an unfinished one goes on, to the same bits.
    """
    settings.shape(settings.vocab_size)  # what cannot be is refused before the corpus is read
    out = Path(out)
    training = out.with_name(out.name + ".training")
    documents = [document for path in corpus for document in read_documents(path)]
    if len(documents) < 2:
        raise InputError(f"{', '.join(map(str, corpus))}: fewer than two documents; give a text with one a line.")
    sha256 = hashlib.sha256("\x1e".join(documents).encode()).hexdigest()
    asked = {"settings": dataclasses.asdict(settings), "documents": len(documents), "sha256": sha256}
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        _refuse_other(out / FACTS, asked, f"{out} exists already")
        return json.loads((out / FACTS).read_text(encoding="utf-8"))
    with hold(training, flag="--out"):
        _forget_other(training, asked)
        write_json(training / FACTS, asked)
        made = asked | _make(out, training, documents, asked, settings)
        shutil.rmtree(training)
    return made


def _make(out: Path, training: Path, documents: list[str], asked: dict, settings: Settings) -> dict:
    """Trains in one folder and writes the directory; returns what was reached."""
    held, rest = _held_out(documents, settings)
    vocabulary = _vocabulary(training / "tokenizer", rest, settings)
    shape = settings.shape(vocabulary.n_text)
    packed, judged = text_rows(rest, vocabulary, settings.length), text_rows(held, vocabulary, settings.length)
    _LOG.info(
        "%d documents (%d held out), %d tokens, a vocabulary of %d",
        len(documents), len(held), int((packed.segments > 0).sum()), vocabulary.n_text,
    )  # fmt: skip
    fitted = _train(training, shape, packed, judged, settings)
    lm = {name: value for name, value in fitted.params["lm"]["lm"].items() if name != "bridge"}
    reached = {
        "perplexity": math.exp(-fitted.value["lm"]),
        "epoch": fitted.phase["lm"] + 1,
        "held_out_tokens": int((judged.text_target >= 0).sum()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(lm)),
        "bdlm_jax": __version__,
    }
    with replacing(out) as folder:
        folder.mkdir()
        write_hf_folder(folder, lm, shape, vocabulary, np.zeros((0, shape.width)), max_tokens=settings.length)
        shutil.copyfile(training / "metrics.jsonl", folder / "metrics.jsonl")
        write_json(folder / FACTS, asked | reached)
    return reached


def _forget_other(training: Path, asked: dict) -> None:
    """Refuses to go on with what other settings have trained; what they have only prepared goes."""
    if (training / FACTS).exists():
        try:
            _refuse_other(training / FACTS, asked, f"{training} was begun")
        except InputError:
            if checkpoint.steps(training / "checkpoints"):
                raise
            shutil.rmtree(training / "tokenizer", ignore_errors=True)


def _refuse_other(path: Path, asked: dict, where: str) -> None:
    """Refuses to go on, or to be done, where the folder is of other settings or of another text."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = {**found["settings"], "the corpus": found["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{where}, and its {path.name} cannot be read: choose another --out, or delete it.") from None
    after = {**asked["settings"], "the corpus": asked["sha256"]}
    if differ := [name for name in after if before.get(name) != after[name]]:
        name = differ[0]
        told = "" if name == "the corpus" else f" ({before.get(name)!r}, and now it is {after[name]!r})"
        raise InputError(f"{where} with another {name}{told}: choose another --out, or the old settings.")


def _held_out(documents: list[str], settings: Settings) -> tuple[list[str], list[str]]:
    """(held out, the rest): a fixed draw, one document at least."""
    n = min(max(1, round(settings.held_out * len(documents))), _MOST_HELD_OUT)
    drawn = set(np.random.default_rng((settings.seed, 7)).permutation(len(documents))[:n].tolist())
    held = [document for number, document in enumerate(documents) if number in drawn]
    return held, [document for number, document in enumerate(documents) if number not in drawn]


def _vocabulary(folder: Path, documents: list[str], settings: Settings) -> Vocabulary:
    if not (folder / "tokenizer.json").exists():
        with replacing(folder) as partial:
            save_tokenizer(train_tokenizer(documents, settings.vocab_size), partial)
    return Vocabulary(load_tokenizer(folder), n_users=0, n_items=0)


def _train(folder: Path, shape: LMConfig, packed: Packed, judged: Packed, settings: Settings) -> Fitted:
    """Trains with `fit`, an epoch a phase, judged by the log-likelihood of a token held out."""
    key, steps = jax.random.key(settings.seed), packed.n_steps(settings.batch_rows)
    total = settings.epochs * steps
    rate = make_schedule("cosine", settings.rate, warmup=max(1, round(_WARMUP * total)), steps=total)
    optimizer = make_optimizer(
        rules=_RULES, groups={"lm": {"learning_rate": rate, "weight_decay": settings.weight_decay}}, clip_norm=1.0
    )
    step = lm_step.make_lm_step(
        arm=DOT_ARM, meeting=Meeting(shape), weights=LMWeights(item=0.0, text=1.0), optimizer=optimizer, rules=_RULES
    )

    def params():
        """The step's tree, in which a table of one user and item stands where a recommender has its own."""
        tables = sharing.init_shared(key, n_users=1, n_items=1, width=1)
        bridge = sharing.init_bridge(key, width=1, lm_width=shape.width)
        return {"shared": tables, "domain": {}, "lm": {**init_lm(jax.random.fold_in(key, 1), shape), "bridge": bridge}}

    def validate(arm, params):
        value = perplexity(params["lm"], shape, judged, batch_rows=settings.batch_rows)
        return {"log_likelihood": -math.log(value), "perplexity": value}

    arm = Arm(
        parallel.compile_step(step, parallel="jit"),
        optimizer,
        batch=lambda number: packed.batch(number, batch_size=settings.batch_rows, seed=settings.seed),
        view=lambda params: {},
        constants={"warm_I": jnp.ones(1, bool)},
    )
    phases = [Phase("lm", steps, f"epoch {number + 1} of {settings.epochs}") for number in range(settings.epochs)]
    with StopSignal() as stop:
        return fit(
            folder,
            stage="pretrain",
            tracker="tensorboard",
            phases=phases,
            arms={"lm": arm},
            params=params,
            key=key,
            judged=("lm",),
            validate=validate,
            select="log_likelihood",
            stop=stop,
        )
