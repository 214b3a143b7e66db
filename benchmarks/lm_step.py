"""Training throughput of the LM arm: our step against transformers' torch Llama, two comparisons, rounds alternating.

`--work targets`: the same random histories; ours packs <bos> <uid> <iid>… and predicts every item, theirs is the usual
recipe: the titles of the history, then the title of one answer, right-padded. `--work equal`: the same random tokens,
full logits at every position, AdamW, next-token loss. `python benchmarks/lm_step.py --work equal --size 30m`
"""

import argparse
import dataclasses
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
import transformers

from bdlm_jax.lm.causal_lm import LMConfig, gather_positions, init_lm, lm_hidden
from bdlm_jax.lm.hf_config import hf_config
from bdlm_jax.lm.packing import pack
from bdlm_jax.lm.prompts import PromptOptions, history_prompt
from bdlm_jax.lm.vocabulary import Vocabulary, train_tokenizer
from bdlm_jax.mutual.lm_step import states_at
from bdlm_jax.mutual.losses import text_loss

# The first three have about as many decoder parameters as the name says (embeddings not counted); the others are the
# shapes of SmolLM-135M, Qwen2.5-0.5B, Llama-3.2-1B and Vicuna-7B.
SIZES = {
    "tiny": dict(width=16, n_layers=1, n_heads=2, n_kv_heads=2, mlp_width=32),
    "2m": dict(width=192, n_layers=4, n_heads=6, n_kv_heads=6, mlp_width=576),
    "30m": dict(width=512, n_layers=9, n_heads=8, n_kv_heads=8, mlp_width=1408),
    "135m": dict(width=576, n_layers=30, n_heads=9, n_kv_heads=3, mlp_width=1536),
    "0.5b": dict(width=896, n_layers=24, n_heads=14, n_kv_heads=2, mlp_width=4864),
    "1b": dict(width=2048, n_layers=16, n_heads=32, n_kv_heads=8, mlp_width=8192),
    "7b": dict(width=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_width=11008, tie_embeddings=False),
}
VOCABULARIES = {"135m": 49_152, "0.5b": 151_936, "1b": 128_256, "7b": 32_000}  # of --work equal; the rest: 8,192
_FIRST, _LAST = ("ba", "co", "du", "fe", "gi", "ka", "lo", "mu", "ne", "po"), ("dan", "ler", "mos", "nix", "rim", "tar")
WORDS = [first + last for first in _FIRST for last in _LAST]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each timed step of one contestant, and what a step holds (means over its batches)."""

    seconds: list[float]
    tokens: float
    targets: float


def make_histories(*, seed, n_users, n_items, n_history):
    """Draws titles of 2-6 words, and histories of half to all of `n_history` items."""
    generator = np.random.default_rng(seed)
    titles = [" ".join(generator.choice(WORDS, generator.integers(2, 7))) for _ in range(n_items)]
    sizes = generator.integers(n_history // 2, n_history + 1, n_users)
    return titles, [generator.choice(n_items, size, replace=False) for size in sizes]


def make_ours(vocabulary, encoded, histories, config, *, kind, length, batch_size):
    """Returns (step number -> None, tokens per step, next-item targets per step) of our packed training step."""
    prompts = [
        history_prompt(vocabulary, items, PromptOptions(kind, max_tokens=length), titles=encoded, user=user)
        for user, items in enumerate(histories)
    ]
    packed = pack(prompts, length, pad=vocabulary.pad)
    params = {
        "lm": init_lm(jax.random.key(0), config),
        "rows": 0.02 * jax.random.normal(jax.random.key(1), (vocabulary.n_rows, config.width)),
    }
    optimizer = optax.adamw(1e-3)

    def loss(params, batch):
        hidden_BLM = lm_hidden(
            params["lm"], config, batch["tokens"], batch["positions"], batch["segments"], params["rows"]
        )
        states = gather_positions(hidden_BLM, batch["item_index"])
        items_IM = params["rows"][vocabulary.n_users :].astype(states.dtype)
        logits = jnp.einsum("btm,im->bti", states, items_IM, preferred_element_type=jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["item_target"], 0))
        has = batch["item_target"] >= 0
        total = jnp.where(has, nll, 0).sum() / has.sum()
        if kind == "ids_titles":
            text_states = states_at(hidden_BLM, batch["text_index"])
            text, count = text_loss(params["lm"], config, text_states, batch["text_target"].reshape(-1))
            total += 0.5 * text / count
        return total

    def update(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    update = jax.jit(update, donate_argnums=(0, 1))
    state = [params, optimizer.init(params)]

    def step(number):
        batch = packed.batch(number, batch_size=batch_size, seed=0)
        state[0], state[1], value = update(*state, batch)
        value.block_until_ready()

    share = batch_size / len(packed)
    return step, (packed.segments > 0).sum() * share, (packed.item_target >= 0).sum() * share


def make_theirs(vocabulary, encoded, histories, config, *, length, batch_size, device):
    """Returns the same of a torch Llama on text prompts with one answer each; the loss is on the answer's tokens."""
    import torch

    model = make_torch_llama(config, length=length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    examples = []
    for items in histories:
        prompt = history_prompt(vocabulary, items, PromptOptions("text", max_tokens=length), titles=encoded)
        answer = len(encoded[items[-1]]) + 1
        labels = np.where(np.arange(len(prompt)) < len(prompt) - answer, -100, prompt.tokens)
        examples.append((torch.from_numpy(prompt.tokens).long(), torch.from_numpy(labels).long()))
    order = np.random.default_rng(0).permutation(len(examples))

    def pad(tensors, value):
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    def step(number):
        chosen = [examples[order[(number * batch_size + n) % len(order)]] for n in range(batch_size)]
        tokens, labels = pad([x for x, _ in chosen], vocabulary.pad), pad([y for _, y in chosen], -100)
        mask = pad([torch.ones_like(x) for x, _ in chosen], 0)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    mean_length = float(np.mean([len(x) for x, _ in examples]))
    return step, mean_length * batch_size, batch_size


def make_torch_llama(config, *, length):
    """Returns transformers' Llama of the same shape, with its default attention (SDPA)."""
    import torch

    torch.manual_seed(0)
    fields = hf_config(config) | {"max_position_embeddings": length}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))


def make_equal_ours(config, tokens_SBL):
    """Returns our step on given tokens: full logits, mean next-token loss, AdamW."""
    n_steps, batch_size, length = tokens_SBL.shape
    params = init_lm(jax.random.key(0), config)
    optimizer = optax.adamw(1e-3, weight_decay=0.01)
    rows_BL = np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length))
    ends_B1 = np.full((batch_size, 1), -1, np.int32)
    # jnp.array: a copy, so that the first step's donation takes nothing from its neighbours.
    fixed = {"positions": jnp.array(rows_BL), "segments": jnp.ones((batch_size, length), jnp.int32)}
    batches = [
        {
            **fixed,
            "tokens": jnp.array(tokens_BL),
            "text_index": fixed["positions"],
            "text_target": jnp.array(np.concatenate([tokens_BL[:, 1:], ends_B1], axis=1)),
        }
        for tokens_BL in tokens_SBL
    ]

    def update(params, state, batch):
        def loss(params):
            hidden_BLM = lm_hidden(params, config, batch["tokens"], batch["positions"], batch["segments"], None)
            states = states_at(hidden_BLM, batch["text_index"])
            total, count = text_loss(params, config, states, batch["text_target"].reshape(-1))
            return total / count

        value, gradient = jax.value_and_grad(loss)(params)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    update = jax.jit(update, donate_argnums=(0, 1))
    state = [params, optimizer.init(params)]

    def step(number):
        state[0], state[1], value = update(*state, batches[number % n_steps])
        value.block_until_ready()

    return step, batch_size * length, batch_size * (length - 1)


def make_equal_theirs(config, tokens_SBL, *, device, compile_it):
    """Returns the same of transformers' torch Llama, eager or through torch.compile."""
    import torch

    n_steps, batch_size, length = tokens_SBL.shape
    model = make_torch_llama(config, length=length).to(device)
    if config.remat:
        model.gradient_checkpointing_enable()
    forward = torch.compile(model) if compile_it else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=device == "cuda")
    batches = [torch.from_numpy(tokens_BL).long().to(device) for tokens_BL in tokens_SBL]

    def step(number):
        tokens = batches[number % n_steps]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step, batch_size * length, batch_size * (length - 1)


def count_flops(config, *, batch_size, length):
    """Model FLOPs of a training step: 6 a weight of a matrix product and token, 12·L·M a token and layer for attention.

    The head counts as a matrix product; causal attention is counted in full, as is the custom (Chowdhery et al. 2022,
    PaLM, appendix B); recomputation is not counted.
    """
    c, k = config, config.head_dim
    layer = c.width * k * (2 * c.n_heads + 2 * c.n_kv_heads) + 3 * c.width * c.mlp_width
    weights = c.n_layers * layer + c.vocab_size * c.width
    return batch_size * length * (6 * weights + 12 * c.n_layers * length * c.n_heads * k)


def measure_matmul_rate(dtype, *, size):
    """FLOP/s of one large square matrix product in the compute type: what utilisation is measured against."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        begin = timing.clock()
        multiply(x).block_until_ready()
        best = min(best, timing.clock() - begin)
    return 2 * size**3 / best


def time_products(config, *, n_rows, repeats=8):
    """Times the matrix products of a step alone, ours and torch's: each weight's forward and both its gradients.

    Returns:
        {(rows, in, out): (how many weights, seconds ours, seconds torch's)}, medians of each in a row.
    """
    import torch

    c, heads = config, config.n_heads * config.head_dim
    weights = [(c.width, heads), (c.width, c.n_kv_heads * c.head_dim)] * 2 + [(c.width, c.mlp_width)] * 3
    counts = {(n_in, n_out): c.n_layers * weights.count((n_in, n_out)) for n_in, n_out in weights}
    counts[c.width, c.vocab_size] = counts.get((c.width, c.vocab_size), 0) + 1
    kinds = (lambda x, w, g: x @ w), (lambda x, w, g: g @ w.T), (lambda x, w, g: x.T @ g)
    compiled = [jax.jit(kind) for kind in kinds]
    table = {}
    for (n_in, n_out), count in counts.items():
        arrays = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(n_rows, n_in), (n_in, n_out)])]
        arrays.append(arrays[0] @ arrays[1])
        tensors = [torch.from_numpy(np.array(x)) for x in arrays]
        ours = sum(time_alone(product, arrays, repeats=repeats) for product in compiled)
        theirs = sum(time_alone(product, tensors, repeats=repeats) for product in kinds)
        table[n_rows, n_in, n_out] = count, ours, theirs
    return table


def time_alone(product, arrays, *, repeats):
    """Median seconds of a short call, a while after what was before it: threads of torch wait without sleeping."""
    time.sleep(0.05)
    seconds = []
    for _ in range(1 + repeats):
        begin = timing.clock()
        jax.block_until_ready(product(*arrays))
        seconds.append(timing.clock() - begin)
    return statistics.median(seconds[1:])


def format_products(table):
    """Writes the products' rates and their share of a step as a Markdown table."""
    lines = ["| product and its two gradients | weights | GFLOP/s, ours | GFLOP/s, torch |", "|---|---|---|---|"]
    for shape, (count, *seconds) in table.items():
        rates = " | ".join(f"{6 * np.prod(shape) / s / 1e9:.0f}" for s in seconds)
        lines.append(f"| {' x '.join(map(str, shape))} | {count} | {rates} |")
    ours, theirs = (sum(row[0] * row[i] for row in table.values()) for i in (1, 2))
    lines.append(f"\nProducts with weights alone, a step: ours {ours:.3f} s, torch {theirs:.3f} s.")
    return "\n".join(lines)


def time_alternating(contestants, *, n_rounds, n_steps):
    """Times every contestant in every round, in an order that turns with the rounds; first steps are not counted."""
    seconds = {name: [] for name in contestants}
    for step, *_ in contestants.values():
        step(0)
        step(1)
    names = list(contestants)
    for round_number in range(n_rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            for number in range(n_steps):
                begin = timing.clock()
                contestants[name][0](2 + round_number * n_steps + number)
                seconds[name].append(timing.clock() - begin)
    return {name: Timing(seconds[name], *contestants[name][1:]) for name in names}


def format_table(timings, *, baseline):
    """Writes medians, spreads (quartiles) and ratios to the baseline as a Markdown table."""
    lines = [
        "| step | s per step, median [quartiles] | tokens/s | next-item targets/s | targets/s against the baseline |",
        "|---|---|---|---|---|",
    ]
    rates = {name: t.targets / statistics.median(t.seconds) for name, t in timings.items()}
    for name, t in timings.items():
        low, middle, high = np.percentile(t.seconds, (25, 50, 75))
        lines.append(
            f"| {name} | {middle:.4f} [{low:.4f}, {high:.4f}] | {t.tokens / middle:,.0f} | {rates[name]:,.1f} "
            f"| {rates[name] / rates[baseline]:.1f} × |"
        )
    return "\n".join(lines)


def format_equal_table(timings, *, flops, rate):
    """Writes medians, tokens/s, utilisation and the ratio to each torch contestant as a Markdown table."""
    lines = [
        "| step | s per step, median [quartiles] | tokens/s | FLOP/s of the matrix product's | time of torch / ours |",
        "|---|---|---|---|---|",
    ]
    ours = statistics.median(timings["ours"].seconds)
    for name, t in timings.items():
        low, middle, high = np.percentile(t.seconds, (25, 50, 75))
        lines.append(
            f"| {name} | {middle:.4f} [{low:.4f}, {high:.4f}] | {t.tokens / middle:,.0f} | {flops / middle / rate:.1%} "
            f"| {middle / ours:.2f} |"
        )
    return "\n".join(lines)


def describe_machine(device):
    """One line of versions, threads and devices."""
    import torch

    accelerator = torch.cuda.get_device_name() if device == "cuda" else "none"
    return (
        f"Python {platform.python_version()}, jax {jax.__version__} on {jax.devices()[0].device_kind}, "
        f"torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {timing.cores()} cores, torch threads "
        f"{torch.get_num_threads()}, torch accelerator: {accelerator}; {timing.unit()}"
    )


def run_equal(args, device):
    """Times equal work and prints its table; a torch.compile that fails is told, not hidden."""
    vocab_size = args.text_vocabulary or VOCABULARIES.get(args.size, 8192)
    config = LMConfig(
        vocab_size=vocab_size, dtype=args.dtype, attention=args.attention, remat=args.remat, **SIZES[args.size]
    )
    batch_size = max(1, args.tokens // args.length)
    shape = (2 + args.rounds * args.steps, batch_size, args.length)
    tokens_SBL = np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int32)
    contestants = {"ours": make_equal_ours(config, tokens_SBL)}
    if args.peers:
        contestants["transformers, torch eager (SDPA)"] = make_equal_theirs(
            config, tokens_SBL, device=device, compile_it=False
        )
        compiled = make_equal_theirs(config, tokens_SBL, device=device, compile_it=True)
        try:
            compiled[0](0)
            contestants["transformers, torch.compile (SDPA)"] = compiled
        except Exception as error:
            print(f"torch.compile does not work here: {type(error).__name__}: {str(error).splitlines()[0]}")
    rate = measure_matmul_rate(args.dtype, size=8192 if device == "cuda" else 2048)
    flops = count_flops(config, batch_size=batch_size, length=args.length)
    n_params = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init_lm(jax.random.key(0), config))))
    print(
        f"{args.size}: {n_params:,} parameters, V = {vocab_size}, {batch_size} x {args.length} tokens, {args.dtype}, "
        f"attention {args.attention}, remat {args.remat}; {flops / 1e12:.3f} TFLOP a step, matrix product "
        f"{rate / 1e12:.3f} TFLOP/s"
    )
    print(describe_machine(device))
    timings = time_alternating(contestants, n_rounds=args.rounds, n_steps=args.steps)
    print(format_equal_table(timings, flops=flops, rate=rate))
    if args.peers and device == "cpu" and args.dtype == "float32":
        print("\n" + format_products(time_products(config, n_rows=batch_size * args.length)))


def run_targets(args, device):
    """Times next-item targets per second against one answer per prompt and prints the table."""
    titles, histories = make_histories(seed=0, n_users=args.users, n_items=args.items, n_history=args.history)
    vocabulary = Vocabulary(train_tokenizer(titles, args.text_vocabulary or 2000), args.users, args.items)
    encoded = vocabulary.encode_text(titles)
    config = LMConfig(vocab_size=vocabulary.n_text, dtype=args.dtype, **SIZES[args.size])
    # Short rows for ids alone, whose prompts are short; the batch holds the same number of tokens.
    id_length = min(args.length, 2 * (args.history + 2))
    contestants = {
        "ours, ids": make_ours(
            vocabulary,
            encoded,
            histories,
            config,
            kind="ids",
            length=id_length,
            batch_size=max(1, args.tokens // id_length),
        ),
        "ours, ids and titles": make_ours(
            vocabulary,
            encoded,
            histories,
            config,
            kind="ids_titles",
            length=args.length,
            batch_size=max(1, args.tokens // args.length),
        ),
        "transformers, one answer": make_theirs(
            vocabulary,
            encoded,
            histories,
            config,
            length=args.length,
            batch_size=max(1, args.tokens // args.length),
            device=device,
        ),
    }
    n_layers = init_lm(jax.random.key(0), config)["layers"]
    n_decoder = sum(x.size for x in jax.tree.leaves(n_layers))
    print(
        f"{n_decoder:,} decoder parameters, V = {vocabulary.n_text}, {args.items} items, {args.tokens} tokens a batch"
    )
    print(describe_machine(device))
    timings = time_alternating(contestants, n_rounds=args.rounds, n_steps=args.steps)
    print(format_table(timings, baseline="transformers, one answer"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=("targets", "equal"), default="targets")
    parser.add_argument("--size", choices=SIZES, default="2m")
    parser.add_argument("--items", type=int, default=4000, help="catalogue size (3,706 in MovieLens-1M)")
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--history", type=int, default=50, help="longest history")
    parser.add_argument("--text-vocabulary", type=int, default=0, help="0: 2,000, or the size's own with equal work")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, and longest text prompt")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a batch, about, for every contestant")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute type of all")
    parser.add_argument("--attention", choices=("einsum", "xla", "cudnn"), default="einsum", help="ours, equal work")
    parser.add_argument("--remat", action="store_true", help="recompute layers in the backward pass, equal work")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours alone, equal work")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each contestant in a round")
    args = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    {"targets": run_targets, "equal": run_equal}[args.work](args, device)


if __name__ == "__main__":
    main()
