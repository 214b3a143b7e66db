"""Hugging Face directories of random weights, GPT-2-shaped and Llama-shaped, and a small BDLM around one of them."""

import dataclasses
import json

import jax
import small_bdlm
from safetensors.numpy import save_file

from bdlm_jax.lm import causal_lm, hf_config, hf_weights, lora, vocabulary
from bdlm_jax.lm.causal_lm import LMConfig
from bdlm_jax.mutual import domain_epoch, lm_step, optimizer
from bdlm_jax.mutual.options import LMWeights
from bdlm_jax.run import build, trained
from bdlm_jax.runtime.parallel import compile_step
from experiments import tiny

WORDS = ["blue wool scarf", "red wool hat", "a user buys a scarf and then a hat"]
GPT2 = LMConfig(
    vocab_size=283, width=8, n_layers=1, n_heads=2, n_kv_heads=2, mlp_width=16, family="gpt2", norm="layer",
    activation="gelu_tanh", gated=False, attention_bias=True, output_bias=True, mlp_bias=True, positions="learned",
    max_positions=96,
)  # fmt: skip
LLAMA = LMConfig(
    vocab_size=283, width=8, n_layers=1, n_heads=4, n_kv_heads=2, mlp_width=12, tie_embeddings=False, max_positions=128
)
SHAPES = {"gpt2": GPT2, "llama": LLAMA}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FEW = LMWeights(item=1.0, text=0.3, align_item=0.4)  # what compiles sooner
PARALLEL = {
    "jit": {},
    "pmap": {"n_devices": 4},
    "mesh": {"n_devices": 4, "mesh": {"data": 2, "fsdp": 2, "tensor": 1}},
}


def write_model(folder, shape: LMConfig, *, tokenizer=True):
    """Writes config.json, model.safetensors and a tokenizer with a chat template; returns the decoder's params.

    `tokenizer` may be one, True for a small one of our own, False for none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params = causal_lm.init_lm(jax.random.key(0), shape)
    (folder / "config.json").write_text(json.dumps(hf_config.hf_config(shape)))
    save_file(dict(hf_weights.export_tensors(params, shape)), folder / "model.safetensors")
    if tokenizer is False:
        return params
    tokenizer = vocabulary.train_tokenizer(WORDS, 270) if tokenizer is True else tokenizer
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return params


def make_run(folder, **lm):
    """Returns a run of experiments/tiny.py with some settings of `lm`."""
    config = tiny.get_config()
    config.lm.update(lm)
    config.prompts.length = 64
    return build.start_run(config, folder)


def init_params(run, stage="ids_lm", loaded=None):
    """The tree with which a stage without a domain model starts."""
    tables = build.measure_tables(run, build.DOT_ARM, build.init_tables(run, stage, build.DOT_ARM), reads="layer0")
    return build.init_params(run, stage, tables, build.make_decoder(run, loaded))


def make_bdlm(folder, shape: LMConfig, trains: str):
    """Writes a model, reads it back as a user's, puts it into `small_bdlm`, and returns (arm, meeting, params)."""
    write_model(folder, dataclasses.replace(shape, vocab_size=small_bdlm.N_TEXT - 3), tokenizer=False)
    shape = dataclasses.replace(hf_config.lm_config_from_hf(folder), vocab_size=small_bdlm.N_TEXT)
    arm = small_bdlm.make_arm()
    meeting = dataclasses.replace(small_bdlm.make_meeting(), lm=shape)
    lm = hf_weights.load_lm(folder, shape)
    if trains == "lora":
        lm[lora.LORA] = lora.init_lora(jax.random.key(2), lm, rank=2, targets=".*_proj/kernel", alpha=4.0)
    return arm, meeting, small_bdlm.make_params(arm, meeting, lm)


def train_round(arm, meeting, params, trains, *, parallel="jit", accumulate=1, domain=False, weights=FEW):
    """Two steps of the LM arm, and where asked a domain epoch against it and LM steps against that.

    Returns (params, metrics of every unit).
    """
    rules = trained.lm_rules(trains, train_shared=True)
    groups = {name: {"learning_rate": 0.01} for name in ("lm", "bridge", "shared")}
    mover = optimizer.make_optimizer(rules=rules, groups=groups, clip_norm=1.0)
    step = lm_step.make_lm_step(
        arm=arm, meeting=meeting, weights=weights, optimizer=mover,
        rules=None if trains == "full" else rules, accumulate=accumulate,
    )  # fmt: skip
    compiled, packed = compile_step(step, parallel=parallel, **PARALLEL[parallel]), small_bdlm.make_rows()
    seen = []

    def run(*inputs):
        state, metrics = small_bdlm.run_steps(*inputs)
        seen.extend(metrics)
        return state

    def train_lm(state, start):
        batches = [packed.batch(start + n, batch_size=8, seed=0) for n in range(2)]
        view = small_bdlm.make_views(arm, meeting, state.params)[0]
        return run(compiled, state, batches, view, small_bdlm.lm_constants())

    state = train_lm(small_bdlm.make_state(params, mover), 0)
    if domain:
        other = small_bdlm.make_optimizer(lm=optimizer.FROZEN)
        epoch = small_bdlm.make_domain_epoch(arm, meeting, optimizer=other)
        epoch = compile_step(epoch, parallel=parallel, **PARALLEL[parallel])
        view = small_bdlm.make_views(arm, meeting, state.params)[1]
        slots = [domain_epoch.make_slots(batch_size=16, kl_users=8)]
        mine = run(epoch, small_bdlm.make_state(state.params, other), slots, view, small_bdlm.domain_constants())
        state = train_lm(state._replace(params=mine.params), 2)
    return state.params, seen
