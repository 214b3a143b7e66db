"""Weights of Hugging Face models in and out: one strict two-way map between their names and our tree.

safetensors files are mapped into memory and read shard by shard, tensor by tensor; each goes to its device and dtype
before the next is touched. A leaf that is stacked over depth is allocated on its device once and filled layer by
layer, so that the host never holds more than one tensor of ours beside the mapped shard.
"""

import functools
import json
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdlm_jax.lm.causal_lm import init_lm
from bdlm_jax.lm.config import LMConfig
from bdlm_jax.types import Array, InputError, Params

IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that old checkpoints store
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
_ROWS = ("embedding", "head")  # leaves that may have more rows than the checkpoint


class _Tensor(NamedTuple):
    """One tensor of a checkpoint: the leaves that it holds side by side, and their layer where they are stacked."""

    leaves: tuple[str, ...]
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def find_folder(name: str | Path) -> Path:
    """Returns the local folder of a model, fetching it from the hub where the name is no folder here.

    Only safetensors and JSON files and tokenizers are fetched, never pickles or code.

    Args:
        name: a folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M".

    Returns:
        The folder.

    Raises:
        InputError: neither a folder nor a model that the hub (or its cache) gives.
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
        raise InputError(
            f"{name} is no folder here, and {why}: check the name, or download the model elsewhere and give its folder."
        ) from error


def load_lm(
    folder: str | Path,
    config: LMConfig,
    *,
    dtype: str = "float32",
    placement: Callable[[str], jax.sharding.Sharding] | None = None,
) -> Params:
    """Reads a Hugging Face model's weights as the tree of `init_lm`.

    Args:
        folder: with model.safetensors, or model.safetensors.index.json and its shards.
        config: `families.lm_config_from_hf` of the same folder; rows of the embedding (and of an untied head) beyond
            the checkpoint's start as the mean of its rows.
        dtype: of the parameters.
        placement: the sharding of each leaf by its path ("layers/mlp/up_proj/kernel"); None is the default device.

    Returns:
        The parameters, on their devices.

    Raises:
        InputError: no safetensors, or a tensor that is missing, unexpected, misshapen or of an unknown dtype.
    """
    folder = Path(folder)
    files = {path: _header(path) for path in _shards(folder)}
    found = {name: path for path, header in files.items() for name in header}
    expected = tensor_map(config)
    names = _resolve(folder, found, expected, config)
    _check_shapes(folder, files, found, expected, names)

    shapes = _leaf_shapes(config)
    leaves: dict[str, Array] = {}
    for path, header in files.items():
        here = [(header[name]["data_offsets"][0], name) for name in names.values() if found[name] == path]
        ours = {stored: name for name, stored in names.items()}
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for _, stored in sorted(here):
                tensor = expected[ours[stored]]
                value = _view(mapped, header[stored])
                for leaf, part in zip(tensor.leaves, _split(value, tensor, shapes)):
                    sharding = None if placement is None else placement(leaf)
                    leaves[leaf] = _store(leaves.get(leaf), part, tensor, shapes[leaf], dtype, sharding)
                jax.block_until_ready([leaves[leaf] for leaf in tensor.leaves])
                del value, part
                if hasattr(mapped, "madvise"):  # the pages just read need not stay
                    mapped.madvise(mmap.MADV_DONTNEED)
    return _nested(leaves)


def export_tensors(params: Params, config: LMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a decoder's weights under Hugging Face's names: the inverse of `load_lm`.

    Args:
        params: the tree of `init_lm`; further subtrees (the bridge) are left out.
        config: the decoder's options; `families.hf_config` writes them.

    Yields:
        (name, array in the parameters' dtype), layer by layer, one on the host at a time.
    """
    for name, tensor in tensor_map(config).items():
        parts = []
        for path in tensor.leaves:
            leaf = params
            for key in path.split("/"):
                leaf = leaf[key]
            parts.append(np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]))
        value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        yield name, np.ascontiguousarray(value.T if tensor.transposed else value)


def tensor_map(config: LMConfig) -> dict[str, _Tensor]:
    """Lists every tensor of a checkpoint of this family and where it stands in our tree.

    Args:
        config: the decoder's options.

    Returns:
        {Hugging Face's name: (leaves, layer, transposed, shape in the checkpoint)}.
    """
    shapes = _leaf_shapes(config)
    tensors = {}
    if config.family == "gpt2":
        top = {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "position_embedding"}
        norm, block = "transformer.ln_f", "transformer.h"
    else:
        top = {"model.embed_tokens.weight": "embedding"}
        norm, block = "model.norm", "model.layers"
    if not config.tie_embeddings:
        top["lm_head.weight"] = "head"
    for name, leaf in top.items():
        tensors[name] = _Tensor((leaf,), None, False, shapes[leaf])
    per_layer = dict(_layer_tensors(config, shapes))
    for layer in range(config.n_layers):
        for name, (leaves, transposed) in per_layer.items():
            whole = _whole_shape([shapes[leaf][1:] for leaf in leaves])
            tensors[f"{block}.{layer}.{name}"] = _Tensor(
                leaves, layer, transposed, whole[::-1] if transposed else whole
            )
    for kind, word in (("scale", "weight"), ("bias", "bias")):
        if f"final_norm/{kind}" in shapes:
            leaf = f"final_norm/{kind}"
            tensors[f"{norm}.{word}"] = _Tensor((leaf,), None, False, shapes[leaf])
    return tensors


_GPT2_MODULES = {  # Conv1D keeps (in, out), as we do
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "attn.c_proj": ("self_attn/o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp/up_proj",),
    "mlp.c_proj": ("mlp/down_proj",),
}


def _layer_tensors(config, shapes):
    """(name inside a layer, (leaves, transposed)) of one layer."""
    inside = [path.removeprefix("layers/") for path in shapes if path.startswith("layers/")]
    modules = list(dict.fromkeys(path.rpartition("/")[0] for path in inside))
    same = {module.replace("/", "."): (module,) for module in modules}
    groups = _GPT2_MODULES if config.family == "gpt2" else same
    for name, group in groups.items():
        for kind in ("kernel", "scale", "bias"):
            if f"{group[0]}/{kind}" in inside:
                leaves = tuple(f"layers/{module}/{kind}" for module in group)
                word = "bias" if kind == "bias" else "weight"
                yield f"{name}.{word}", (leaves, kind == "kernel" and config.family != "gpt2")


def _whole_shape(parts):
    return (*parts[0][:-1], sum(part[-1] for part in parts))


@functools.lru_cache(maxsize=8)
def _leaf_shapes(config):
    tree = jax.eval_shape(functools.partial(init_lm, config=config), jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(part.key for part in path): leaf.shape for path, leaf in flat}


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


def _header(path):
    """{tensor name: {"dtype", "shape", "data_offsets"}}, the offsets counted from the file's begin."""
    try:
        with open(path, "rb") as file:
            n = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= n <= size - 8:
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(n))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = (8 + n + offset for offset in entry["data_offsets"])
            entry["data_offsets"], entry["shape"] = (first, end), tuple(entry["shape"])
            if not 8 + n <= first <= end <= size:
                raise ValueError(f"{name} ends behind the file's end")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a safetensors file: {error}; fetch it again.") from error
    return header


def _resolve(folder, found, expected, config):
    """{our name: stored name}; a base model's files lack the first part of the names."""
    prefix = "transformer." if config.family == "gpt2" else "model."
    stored = lambda name: name if name in found else name.removeprefix(prefix)  # noqa: E731
    names = {name: stored(name) for name in expected}
    missing = [name for name, at in names.items() if at not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder} lacks the tensor {missing[0]}{more}: is it a {config.family} of this config.json?")
    known = set(names.values())
    for name in found:
        if name in known or name.endswith(IGNORED) or (config.tie_embeddings and name == "lm_head.weight"):
            continue
        raise InputError(
            f"{found[name]} has the tensor {name}, which a {config.family} of this config.json has not: "
            "the files do not belong together, or it is another kind of model."
        )
    return names


def _check_shapes(folder, files, found, expected, names):
    for name, stored in names.items():
        entry, tensor = files[found[stored]][stored], expected[name]
        shape, wanted = entry["shape"], tensor.shape
        if tensor.leaves[0] in _ROWS and len(shape) == 2 and shape[0] <= wanted[0]:
            wanted = (shape[0], wanted[1])
        if shape != wanted or not all(shape):
            raise InputError(
                f"{found[stored]}: the tensor {stored} has the shape {shape}, the config asks for {wanted}."
            )
        if entry["dtype"] not in _DTYPES:
            raise InputError(
                f"{found[stored]}: the tensor {stored} has the dtype {entry['dtype']}; {', '.join(_DTYPES)} are read "
                "(a quantised checkpoint is not)."
            )
        if entry["data_offsets"][1] - entry["data_offsets"][0] != np.prod(shape) * _dtype(entry).itemsize:
            raise InputError(
                f"{found[stored]}: the tensor {stored} has another size than its shape says; fetch it again."
            )


def _dtype(entry):
    word = _DTYPES[entry["dtype"]]
    return jnp.dtype(word) if word == "bfloat16" else np.dtype(word)


def _view(mapped, entry):
    count = int(np.prod(entry["shape"]))
    flat = np.frombuffer(mapped, _dtype(entry), count, entry["data_offsets"][0])
    # jax may keep a host array that it is given, and a mapped one ends with its file.
    return flat.reshape(entry["shape"]).copy()


def _split(value, tensor, shapes):
    if len(tensor.leaves) == 1:
        return [value]
    ends = np.cumsum([shapes[leaf][-1] for leaf in tensor.leaves])
    return np.split(value, ends[:-1], axis=-1)


def _store(leaf, part, tensor, shape, dtype, sharding):
    """Puts a part into its leaf, which is allocated at its first."""
    if tensor.layer is None:
        return _place(_with_mean_rows(part, shape[0]), sharding, dtype)
    if leaf is None:
        leaf = jnp.zeros(shape, dtype, device=sharding)
    fill = _make_fill(sharding, tensor.transposed)
    return fill(leaf, _place(part, _below(sharding, tensor.transposed)), tensor.layer)


@functools.lru_cache(maxsize=256)
def _make_fill(sharding, transposed):
    """Writes one layer of a stacked leaf in place; casting and transposing are the device's work."""

    def fill(stacked, part, layer):
        part = part.T if transposed else part
        return jax.lax.dynamic_update_index_in_dim(stacked, part.astype(stacked.dtype), layer, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


def _place(value, sharding, dtype=None):
    dtype = value.dtype if dtype is None else jnp.dtype(dtype)
    if sharding is None:
        return jnp.asarray(value).astype(dtype)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index].astype(dtype, copy=False))


def _below(sharding, transposed):
    """The sharding of one layer of a stacked leaf, as the checkpoint has it."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = sharding.spec[1:]
    if transposed:
        spec = (*spec, None, None)[:2][::-1]
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


def _with_mean_rows(value, n_rows):
    if len(value) == n_rows:
        return value
    mean = value.mean(axis=0, dtype=np.float32).astype(value.dtype)
    return np.concatenate([value, np.broadcast_to(mean, (n_rows - len(value), *value.shape[1:]))])


def _nested(leaves):
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
