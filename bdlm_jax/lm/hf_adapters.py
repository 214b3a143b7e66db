"""Adapters beside a Hugging Face model as PEFT reads them: `PeftModel.from_pretrained(model, folder)`.

PEFT computes W x + alpha/r · B A x with A (r, in) and B (out, r): both are our matrices, transposed. GPT-2 keeps q, k
and v side by side in one weight: there the A lie below each other and the B on a diagonal of blocks, with r and alpha
as many times as large.
"""

import os
from pathlib import Path

import jax
import numpy as np
from scipy.linalg import block_diag

from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.hf_weights import tensor_map
from bdlm_jax.lm.lora import LORA
from bdlm_jax.runtime.files import write_json, write_tensors
from bdlm_jax.types import Params, leaf_name

FOLDER = "recommends"  # within the model's


def write_adapters(folder: str | os.PathLike, params: Params, config: LMConfig) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a new folder.

    Args:
        params: the decoder's tree with adapters, all of them in its layers.
    """
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    alpha, rank, tensors, modules = float(leaves[f"{LORA}/alpha"]), 0, {}, {}
    for name, tensor in tensor_map(config).items():
        adapted = [leaf for leaf in tensor.leaves if f"{LORA}/{leaf}/a" in leaves]
        if not adapted:
            continue
        a, b = ({leaf: np.asarray(leaves[f"{LORA}/{leaf}/{side}"][tensor.layer]) for leaf in adapted} for side in "ab")
        none = {leaf: np.zeros((0, leaves[leaf].shape[-1]), np.float32) for leaf in tensor.leaves}
        matrices = np.concatenate([*a.values()], axis=1).T, block_diag(*(none | b).values()).T
        stem = name.removesuffix(".weight")
        for side, matrix in zip("AB", matrices):
            tensors[f"base_model.model.{stem}.lora_{side}.weight"] = np.ascontiguousarray(matrix, np.float32)
        rank = a[adapted[0]].shape[-1]
        modules[stem.partition(f".{tensor.layer}.")[2]] = len(adapted)
    fused = {module: n for module, n in modules.items() if n > 1}
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # the folder above, wherever that lies
        "inference_mode": True,
        "target_modules": [*modules],
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",  # its Conv1D keeps (in, out)
        "rank_pattern": {module: n * rank for module, n in fused.items()},
        "alpha_pattern": {module: n * alpha for module, n in fused.items()},
    }
    folder = Path(folder)
    folder.mkdir()
    write_json(folder / "adapter_config.json", facts)
    write_tensors(folder / "adapter_model.safetensors", tensors, metadata={"format": "pt"})
