"""A decoder and its users and items as a Hugging Face directory that transformers loads by itself.

The rows of <uid> and <iid> stand behind the text rows, under the numbers that they have here, in the weights and in the
tokenizer. What the folder says of a run (its card, its raw ids) is `serving.exports`'.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from bdlm_jax.lm.config import LMConfig
from bdlm_jax.lm.hf_config import hf_config
from bdlm_jax.lm.hf_weights import export_tensors, tensor_map
from bdlm_jax.lm.vocabulary import Vocabulary, save_tokenizer
from bdlm_jax.runtime.files import write_json, write_tensors
from bdlm_jax.types import Array, InputError, Params


def write_hf_folder(
    folder: str | os.PathLike,
    params: Params,
    config: LMConfig,
    vocabulary: Vocabulary,
    id_rows_XM: Array,
    *,
    scored_IM: Array | None = None,
    max_tokens: int | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config, weights and tokenizer with the rows of the id tokens behind those of the text.

    Their rows stand in the embedding and in the output head, so that a tied model stays tied. Gemma alone multiplies
    what it embeds by √M: there the embedding holds the id rows divided by it and the head, untied, as they are.

    Args:
        params: the tree of `init_lm`; adapters are merged before.
        id_rows_XM: rows of <uid> and <iid>, through the bridge.
        scored_IM: rows of <iid> in the output head, where they differ from those that are read: it is untied then.
        max_tokens: the longest row that it was trained on, written where the config names none.
        shard_bytes: above this size the weights are cut into several files.
    """
    folder, tokenizer = Path(folder), id_tokenizer(vocabulary)
    if config.tie_embeddings and (config.scale_embedding or scored_IM is not None):
        params = {**params, "head": params["embedding"]}
        config = dataclasses.replace(config, tie_embeddings=False)
    special = {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}
    changed = {"vocab_size": vocabulary.n_tokens, "torch_dtype": str(params["embedding"].dtype), **special}
    if config.max_positions is None and max_tokens is not None:
        changed["max_position_embeddings"] = max_tokens
    write_json(folder / "config.json", hf_config(config) | changed)
    # Plain text holds no user and no item. A forward pass, which ranks, is not touched by it.
    write_json(folder / "generation_config.json", special | {"suppress_tokens": _never_written(vocabulary)})
    rows_XM = np.asarray(id_rows_XM, np.float32)
    _write_shards(folder, _tensors(params, config, rows_XM, scored_IM), shard_bytes=shard_bytes)
    save_tokenizer(tokenizer, folder)
    _tell_every_version(folder / "tokenizer_config.json")


def id_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """Returns a copy of the tokenizer with <uid_0> … and <iid_0> … numbered as `Vocabulary` numbers them.

    The id tokens are special, never normalised, and found wherever they stand in a text. A tokenizer numbers what is
    added without a gap, but V is rounded up (and a pretrained model may have more rows than its tokenizer has tokens):
    <unused_N> fills every number between, so that no row has to move.
    """
    tokenizer, known = copy.deepcopy(vocabulary.tokenizer), vocabulary.tokenizer.get_vocab()
    first = max(known.values()) + 1
    names = [f"<unused_{token}>" for token in range(first, vocabulary.n_text)]
    names += [f"<uid_{user}>" for user in range(vocabulary.n_users)]
    names += [f"<iid_{item}>" for item in range(vocabulary.n_items)]
    if taken := [name for name in names if name in known]:
        raise InputError(f"the run's tokenizer has a text token {taken[0]} already: train with another tokenizer.")
    # Not single_word: a title may begin right behind its <iid>.
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(names) != list(range(first, first + len(names))):
        raise InputError(
            f"the run's tokenizer has {len(known)} tokens but numbers them up to {first - 1}: added tokens would "
            "get other numbers in transformers than in the run; train with a tokenizer without holes."
        )
    return tokenizer


def _never_written(vocabulary: Vocabulary) -> list[int]:
    """What text may not hold: the id tokens, rows that no token has, and <user> and <item>."""
    first = max(vocabulary.tokenizer.get_vocab().values()) + 1
    return sorted({vocabulary.unnamed_user, vocabulary.unnamed_item, *range(first, vocabulary.n_tokens)})


def _tell_every_version(path: Path) -> None:
    """Leaves in tokenizer_config.json what transformers 4 and 5 both read.

    Version 5 writes a class that 4 has not, a list that 4 takes for a dict (which tokens are special is also in
    tokenizer.json), and how the folder was read.
    """
    facts = json.loads(path.read_text(encoding="utf-8"))
    read = {"is_local", "local_files_only", "backend"}
    listed = {name for name in ("extra_special_tokens",) if isinstance(facts.get(name), list)}
    kept = {name: fact for name, fact in facts.items() if name not in read | listed}
    write_json(path, kept | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _tensors(
    params: Params, config: LMConfig, rows_XM: np.ndarray, scored_IM: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    scale = np.float32(config.width**0.5) if config.scale_embedding else np.float32(1)
    behind = {"embedding": rows_XM / scale, "head": rows_XM}
    if scored_IM is not None:
        behind["head"] = np.concatenate([rows_XM[: -len(scored_IM)], scored_IM])
    leaves = {name: tensor.leaves[0] for name, tensor in tensor_map(config).items()}
    for name, value in export_tensors(params, config):
        if leaves[name] in behind:
            value = np.concatenate([value, behind[leaves[name]].astype(value.dtype)])
        yield name, value


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], *, shard_bytes: int) -> None:
    shard_of, total, n_shards = {}, 0, 0
    for n_shards, shard in enumerate(_shards(tensors, shard_bytes), start=1):
        write_tensors(folder / f"model-{n_shards}", shard, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(shard, n_shards)
        total += sum(value.nbytes for value in shard.values())
    if n_shards == 1:
        os.replace(folder / "model-1", folder / "model.safetensors")
        return
    files = {n: f"model-{n:05d}-of-{n_shards:05d}.safetensors" for n in range(1, n_shards + 1)}
    for n, file in files.items():
        os.replace(folder / f"model-{n}", folder / file)
    weight_map = {name: files[n] for name, n in shard_of.items()}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Gathers tensors up to a size; what was yielded is gone from memory before the next is gathered."""
    held = {}
    for name, value in tensors:
        if held and sum(one.nbytes for one in held.values()) + value.nbytes > shard_bytes:
            yield held
            held.clear()
        held[name] = value
    yield held
