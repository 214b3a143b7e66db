"""Weights of Hugging Face models in and out: one strict two-way map between their names and our tree.

Files are mapped into memory, and each device's part of a leaf is written once: stacked over depth, transposed and cast
on the way. A device whose memory is the host's takes it as it lies; others are handed a part at a time, so that the
host holds one leaf of ours at most.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from bdlm_jax.lm.causal_lm import init_lm
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.runtime.files import refuse_pointer
from bdlm_jax.types import InputError, Params, leaf_name

IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that old checkpoints store
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_ROWS = ("embedding", "head")  # leaves that may have more rows than the checkpoint
_THREADS = 4  # that copy at once: NumPy lets others run meanwhile, and memory is what they wait for
_AT_ONCE = 128  # rows that are transposed together: a whole matrix, element by element, takes six times as long
_ALIGNED = 64  # bytes, as XLA asks of what it takes without a copy


class _Tensor(NamedTuple):
    """One tensor of a checkpoint: the leaves that it holds side by side, and their layer where they are stacked."""

    leaves: tuple[str, ...]
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    """Where a tensor lies, and what its file's header says of it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def find_folder(name: str | Path) -> Path:
    """Returns the local folder of a model; a hub id such as "HuggingFaceTB/SmolLM2-135M" is fetched from the hub.

    Only safetensors and JSON files and tokenizers are fetched, never pickles or code.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except HFValidationError:
        raise InputError(f"{name} is no folder here and no hub id (owner/name): check the path.") from None
    except (LocalEntryNotFoundError, OSError) as error:
        why = "the hub refused it" if isinstance(error, HfHubHTTPError) else "the hub cannot be reached"
        raise InputError(f"{name} is no folder here, and {why}: check it, or give a folder of the model.") from error


def load_lm(
    folder: str | Path,
    config: LMConfig,
    *,
    dtype: str = "float32",
    placement: Callable[[str], jax.sharding.Sharding] | None = None,
) -> Params:
    """Reads a Hugging Face model's weights as the tree of `init_lm`, on their devices.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and its shards.
        config: of the same folder; rows of the embedding (and of an untied head) beyond the checkpoint's start as the
            mean of its rows.
        dtype: of the parameters.
        placement: the sharding of each leaf by its path ("layers/mlp/up_proj/kernel"); None is the default device.
    """
    folder, expected, shapes = Path(folder), tensor_map(config), _leaf_shapes(config)
    stored = _read_headers(folder)
    names = _resolve(folder, stored, expected, config)
    _check_tensors(stored, expected, names)
    sources = {leaf: [] for leaf in shapes}  # of each leaf, its layers in order
    for ours, name in names.items():
        for n, leaf in enumerate(expected[ours].leaves):
            sources[leaf].append((stored[name], expected[ours], n))
    leaves = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for leaf, shape in shapes.items():
            ends = np.cumsum([0, *(shapes[other][-1] for other in sources[leaf][0][1].leaves)])
            read = functools.partial(_read, sources[leaf], ends, shape, jnp.dtype(dtype), pool)
            sharding = None if placement is None else placement(leaf)
            if sharding is None:
                leaves[leaf] = jax.device_put(read((slice(None),) * len(shape)))
            else:
                leaves[leaf] = jax.make_array_from_callback(shape, sharding, read)
            leaves[leaf].block_until_ready()  # or the host would hold several
    return jax.tree.map_with_path(lambda path, _: leaves[leaf_name(path)], _abstract(config))


def check_folder(folder: str | Path, config: LMConfig) -> None:
    """Refuses a model that `load_lm` would refuse, whose vocabulary is another than `config`'s, or that holds a NaN.

    `config` is that of the folder's config.json as it stands; every tensor is read once.
    """
    folder, expected = Path(folder), tensor_map(config)
    stored = _read_headers(folder)
    names = _resolve(folder, stored, expected, config)
    _check_tensors(stored, expected, names, exactly=True)
    for name in names.values():
        with safe_open(stored[name].path, "numpy") as file:
            value = file.get_tensor(name)
        if not np.isfinite(value).all():
            raise InputError(
                f"{stored[name].path}: the tensor {name} holds {int((~np.isfinite(value)).sum())} values that are no "
                "finite numbers: the file is damaged, or its training went astray; fetch it again."
            )


def export_tensors(params: Params, config: LMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a decoder's weights under Hugging Face's names, in the parameters' dtype: the inverse of `load_lm`.

    One layer's tensor is on the host at a time; further subtrees of `params` (the bridge) are left out.
    """
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for name, tensor in tensor_map(config).items():
        whole = [leaves[leaf] for leaf in tensor.leaves]
        parts = [np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]) for leaf in whole]
        value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        yield name, np.ascontiguousarray(value.T if tensor.transposed else value)


_TOP = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm/scale", "lm_head.weight": "head"}
_GPT2_TOP = {
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "position_embedding",
    "transformer.ln_f.weight": "final_norm/scale",
    "transformer.ln_f.bias": "final_norm/bias",
    "lm_head.weight": "head",
}
_GPT2_MODULES = {  # Conv1D keeps (in, out), as we do
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "attn.c_proj": ("self_attn/o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp/up_proj",),
    "mlp.c_proj": ("mlp/down_proj",),
}


def tensor_map(config: LMConfig) -> dict[str, _Tensor]:
    """Lists every tensor of a checkpoint of this family by its name there, and where it stands in our tree."""
    shapes, gpt2 = _leaf_shapes(config), config.family == "gpt2"
    top, stem = (_GPT2_TOP, "transformer.h") if gpt2 else (_TOP, "model.layers")
    tensors = {name: _Tensor((leaf,), None, False, shapes[leaf]) for name, leaf in top.items() if leaf in shapes}
    for layer in range(config.n_layers):
        for name, leaves, transposed in _layer_tensors(shapes, gpt2=gpt2):
            shape = (*shapes[leaves[0]][1:-1], sum(shapes[leaf][-1] for leaf in leaves))
            shape = shape[::-1] if transposed else shape
            tensors[f"{stem}.{layer}.{name}"] = _Tensor(leaves, layer, transposed, shape)
    return tensors


def _layer_tensors(shapes, *, gpt2):
    """Yields (name inside a layer, leaves, transposed)."""
    modules = dict.fromkeys(path[len("layers/") :].rpartition("/")[0] for path in shapes if path.startswith("layers/"))
    groups = _GPT2_MODULES if gpt2 else {module.replace("/", "."): (module,) for module in modules}
    for name, group in groups.items():
        for kind, theirs in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            if f"layers/{group[0]}/{kind}" in shapes:
                leaves = tuple(f"layers/{module}/{kind}" for module in group)
                yield f"{name}.{theirs}", leaves, kind == "kernel" and not gpt2


@functools.lru_cache(maxsize=8)
def _abstract(config):
    return jax.eval_shape(functools.partial(init_lm, config=config), jax.random.key(0))


def _leaf_shapes(config):
    return {leaf_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(_abstract(config))}


def _shards(folder):
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is no index of safetensors files ({error!r}): fetch it again.") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{index} names {name}, which is not in the folder: fetch it too.")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    if any(folder.glob("*.bin")):
        raise InputError(
            f"{folder} has its weights as .bin pickles only, which are never opened here: convert them where you trust "
            "them, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)."
        )
    raise InputError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json.")


def _read_headers(folder) -> dict[str, _Stored]:
    stored = {}
    for path in _shards(folder):
        refuse_pointer(path)
        try:
            with safe_open(path, "numpy"), open(path, "rb") as file:  # the library checks what is then read here
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, facts in header.items():
                at = 8 + length + facts["data_offsets"][0]
                stored[name] = _Stored(path, facts["dtype"], tuple(facts["shape"]), at)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read as a safetensors file: {error}; fetch it again.") from error
    return stored


def _resolve(folder, stored, expected, config):
    """{our name: stored name}; a base model's files lack the first part of the names."""
    prefix = "transformer." if config.family == "gpt2" else "model."
    names = {name: name if name in stored else name.removeprefix(prefix) for name in expected}
    if missing := [name for name, at in names.items() if at not in stored]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder} lacks the tensor {missing[0]}{more}: is it a {config.family} of this config.json?")
    known = {*names.values(), *(["lm_head.weight"] if config.tie_embeddings else [])}
    if strange := [name for name in stored if name not in known and not name.endswith(IGNORED)]:
        raise InputError(
            f"{stored[strange[0]].path} has the tensor {strange[0]}, which a {config.family} of this config.json has "
            "not: the files do not belong together, or it is another kind of model."
        )
    return names


def _check_tensors(stored, expected, names, *, exactly=False):
    for ours, name in names.items():
        (path, dtype, shape, _), wanted = stored[name], expected[ours].shape
        if exactly and expected[ours].leaves[0] in _ROWS and len(shape) == 2 and shape[0] != wanted[0]:
            raise InputError(
                f"{path}: the tensor {name} has {shape[0]} rows, and vocab_size in config.json is {wanted[0]}: the "
                "files do not belong together; fetch both again, or write the number of rows into config.json."
            )
        if expected[ours].leaves[0] in _ROWS and len(shape) == 2 and shape[0] <= wanted[0]:
            wanted = (shape[0], wanted[1])
        if shape != wanted or not all(shape):
            raise InputError(f"{path}: the tensor {name} has the shape {shape}, the config asks for {wanted}.")
        if dtype not in _DTYPES:
            raise InputError(
                f"{path}: the tensor {name} has the dtype {dtype}; {', '.join(_DTYPES)} are read (a quantised "
                "checkpoint is not)."
            )


def _read(sources, ends, shape, dtype, pool, index):
    """Writes the part of a leaf that a device holds, from the tensors that it is stacked of."""
    spans = [range(size)[within] for size, within in zip(shape, index)]
    part = _empty([len(span) for span in spans], dtype)
    if sources[0][1].layer is None:
        _copy(part, _pad(_view(sources[0], ends), shape)[index])
        return part

    def write(place):  # mapped here, for what was mapped counts as the host's until it is let go
        _copy(part[place], _view(sources[spans[0][place]], ends)[index[1:]])

    list(pool.map(write, range(len(part))))
    return part


def _view(source, ends):
    """A tensor as its leaf has it, still on disk; of a tensor that holds several leaves, this one's columns."""
    (path, dtype, shape, offset), tensor, n = source
    value = np.memmap(path, _DTYPES[dtype], "r", offset, shape).view(np.ndarray)
    return value.T if tensor.transposed else value[..., ends[n] : ends[n + 1]]


def _pad(value, shape):
    """Rows beyond the checkpoint's are the mean of its rows."""
    spare = shape[0] - len(value), *value.shape[1:]
    if not spare[0]:
        return value
    mean = value.mean(axis=0, dtype=np.float32).astype(value.dtype)
    return np.concatenate([value, np.broadcast_to(mean, spare)])


def _copy(to, value):
    """Casts and copies; a transposed matrix in strips, so that each line of the processor's cache is read once."""
    if value.flags.c_contiguous:
        to[...] = value
        return
    for start in range(0, value.shape[-1], _AT_ONCE):
        strip = slice(start, start + _AT_ONCE)
        to[:, strip] = value[:, strip].astype(to.dtype, order="K", copy=False)


def _empty(shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNED, np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)
