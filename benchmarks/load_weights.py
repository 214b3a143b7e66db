"""Times the loading of a 1-GB sharded checkpoint and its peak of host memory, against transformers' loader.

    python benchmarks/load_weights.py [--gigabytes 1.0] [--dtype bfloat16]

Each loader runs in a fresh process, Linux only (VmHWM). On CPU the parameters lie in host memory themselves.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARDS = 4
SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes random bfloat16 shards and returns the bytes of all."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    from bdlm_jax.lm.hf_config import lm_config_from_hf
    from bdlm_jax.lm.hf_weights import tensor_map

    sizes = [2 * count_parameters(tensor_map(lm_config_from_hf({**SHAPE, "num_hidden_layers": n}))) for n in (1, 2)]
    n_layers = max(1, round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": n_layers}))
    tensors = tensor_map(lm_config_from_hf(folder))
    limit = 2 * count_parameters(tensors) / SHARDS
    generator, weight_map, part, size, total = np.random.default_rng(0), {}, {}, 0, 0
    for n, (name, tensor) in enumerate(tensors.items()):
        part[name] = (generator.standard_normal(tensor.shape, np.float32) * 0.02).astype(jnp.bfloat16)
        size += part[name].nbytes
        if size >= limit or n == len(tensors) - 1:
            file = f"model-{len(set(weight_map.values()))}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
            part, size, total = {}, 0, total + size
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def count_parameters(tensors) -> int:
    """Sums the sizes of a checkpoint's tensors."""
    import math

    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def load_ours(folder: Path, dtype: str):
    """Loads with bdlm_jax; returns ((seconds, of the CPU), MB before, peak MB, bytes of the parameters)."""
    import jax

    from bdlm_jax.lm.hf_config import lm_config_from_hf
    from bdlm_jax.lm.hf_weights import load_lm

    config = lm_config_from_hf(folder)
    jax.numpy.zeros(()).block_until_ready()
    before, start, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    params = jax.block_until_ready(load_lm(folder, config, dtype=dtype))
    seconds = time.perf_counter() - start, time.process_time() - cpu
    return seconds, before, _memory("VmHWM"), sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def load_theirs(folder: Path, dtype: str):
    """Loads with transformers and touches every weight, for a mapped one is not loaded yet."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 (imported before the clock starts)

    before, start, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.detach().view(-1)[:: 4096 // parameter.element_size()].sum()
    seconds = time.perf_counter() - start, time.process_time() - cpu
    return seconds, before, _memory("VmHWM"), sum(p.nbytes for p in model.parameters())


def _memory(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1000
    raise SystemExit("This benchmark reads /proc/self/status, which this system has not.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        result = (load_ours if args.only == "bdlm_jax" else load_theirs)(args.folder, args.dtype)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        total = write_checkpoint(Path(folder), args.gigabytes)
        largest = max(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        sys.stdout.write(
            f"{total / 1e6:.0f} MB of bfloat16, largest shard {largest / 1e6:.0f} MB, read as {args.dtype}\n\n"
            "| loader | seconds | CPU seconds | peak host MB | of it before | parameters | peak beyond both |\n"
            "|---|---|---|---|---|---|---|\n"
        )
        for name in ("bdlm_jax", "transformers"):
            command = [sys.executable, __file__, "--only", name, "--folder", folder, "--dtype", args.dtype]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            (seconds, cpu), before, peak, size = json.loads(output.splitlines()[-1])
            parameters = size / 1e6
            sys.stdout.write(
                f"| {name} | {seconds:.2f} | {cpu:.2f} | {peak:.0f} | {before:.0f} | {parameters:.0f} | "
                f"{peak - before - parameters:.0f} |\n"
            )


if __name__ == "__main__":
    main()
