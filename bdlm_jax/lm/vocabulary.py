"""The LM's vocabulary: a byte-level tokenizer for text, then one token for each user and each item.

Text tokens are 0…V-1, user u is V + u, item i is V + U + i. Text that looks like a special or an id token is encoded as
the plain text it is.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises every run to install torch

from transformers import PreTrainedTokenizerFast

from bdlm_jax.runtime.files import refuse_pointer
from bdlm_jax.types import Array, InputError

PAD, BOS, EOS, UNNAMED_USER, UNNAMED_ITEM = "<pad>", "<bos>", "<eos>", "<user>", "<item>"
_SPECIALS = (PAD, BOS, EOS, UNNAMED_USER, UNNAMED_ITEM)
_GPT2_END = "<|endoftext|>"
ASKED = "Which items does this user choose, one after the other?"
_DATE = "01 Jan 2024"
_ROUND_TO = 8  # matrix units and shardings like a round number of rows


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with the specials <pad> <bos> <eos> <user> <item>, so that any text can be encoded.

    `vocab_size` is at least 261 (256 bytes and 5 specials); little text yields fewer tokens than wanted.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fewest = len(alphabet) + len(_SPECIALS)
    if vocab_size < fewest:
        raise InputError(f"vocab_size {vocab_size} cannot hold the bytes: give at least {fewest}.")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(_SPECIALS), initial_alphabet=sorted(alphabet), show_progress=False
    )
    # The trainer's time grows with the square of a word: one of 300,000 letters took minutes, and is no word.
    words = (re.sub(r"(\w{1000})\w+", r"\1", text) for text in texts)
    tokenizer.train_from_iterator(words, trainer)
    return _with_specials(PreTrainedTokenizerFast(tokenizer_object=tokenizer))  # it finds its own again, by their names


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Loads a transformers tokenizer directory, or GPT-2's two files, and adds the specials it lacks.

    The folder holds tokenizer.json (and tokenizer_config.json, which names its specials), or vocab.json and merges.txt.
    A tokenizer's own beginning and end tokens are kept; padding is never shared with them.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        refuse_pointer(folder / "tokenizer.json")
        try:  # not AutoTokenizer, which imports torch
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # tokenizers raises the bare class
            raise InputError(f"{folder} has no tokenizer that transformers reads ({error}): save it again.") from error
        return _with_specials(tokenizer)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        raise InputError(f"{folder} holds no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt.")
    tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    ends = {"bos_token": _GPT2_END, "eos_token": _GPT2_END} if tokenizer.token_to_id(_GPT2_END) is not None else {}
    return _with_specials(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike) -> None:
    """Writes a transformers tokenizer directory, which `load_tokenizer` reads."""
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # tokenizers raises the bare class, of a full disk say
        raise InputError(f"the tokenizer cannot be written to {folder} ({error}); make room there.") from error


def count_tokens(folder: str | os.PathLike) -> int:
    """Counts the rows that a tokenizer folder needs as it stands, without what `load_tokenizer` adds."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        return max(load_tokenizer(folder).get_vocab().values()) + 1
    refuse_pointer(folder / "tokenizer.json")
    try:
        known = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises the bare class
        raise InputError(f"{folder} has no tokenizer that can be read ({error}): save or fetch it again.") from error
    return max(known.values(), default=-1) + 1


def chat_head(tokenizer: PreTrainedTokenizerFast, message: str = ASKED) -> tuple[int, ...]:
    """Encodes a user's message by the tokenizer's chat template, as far as where the assistant begins to answer.

    A history is the answer: each of its items is predicted from what stands before. The template runs in the sandbox
    of transformers; one that writes the date gets always the same.
    """
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True, date_string=_DATE
        )
    except Exception as error:  # jinja's own, and whatever a template raises
        raise InputError(
            f"the tokenizer's chat template cannot be used ({error}): mend it, or set prompts.chat to never."
        ) from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _byte_level(model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_specials(tokenizer):
    wanted = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    if tokenizer.pad_token in (tokenizer.bos_token, tokenizer.eos_token):
        tokenizer.pad_token = None
    tokenizer.add_special_tokens({kind: token for kind, token in wanted.items() if getattr(tokenizer, kind) is None})
    known = set(tokenizer.all_special_tokens)
    tokenizer.add_tokens([t for t in (UNNAMED_USER, UNNAMED_ITEM) if t not in known], special_tokens=True)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the numbering of the id tokens behind it."""

    tokenizer: PreTrainedTokenizerFast
    n_users: int
    n_items: int
    min_text: int = 0  # V is at least this: a pretrained model may have more rows than its tokenizer has tokens
    chat: tuple[int, ...] = ()  # what begins a history in a model's conversation (`chat_head`); empty: <bos> alone

    @cached_property
    def n_text(self) -> int:
        """V: rows of the text embedding, a multiple of 8; rows above the tokenizer's last token are never produced."""
        highest = max(max(self.tokenizer.get_vocab().values()) + 1, self.min_text)
        return -(-highest // _ROUND_TO) * _ROUND_TO

    @property
    def n_rows(self) -> int:
        """X = U + I, rows of the id tokens: what `lm_hidden` is given as `id_rows_XM`."""
        return self.n_users + self.n_items

    @property
    def n_tokens(self) -> int:
        """All tokens, V + X."""
        return self.n_text + self.n_rows

    @cached_property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @cached_property
    def bos(self) -> int:
        """Begins a prompt."""
        return int(self.tokenizer.bos_token_id)

    @property
    def head(self) -> tuple[int, ...]:
        """What begins a history: the head of a conversation, or <bos>."""
        return self.chat or (self.bos,)

    @cached_property
    def eos(self) -> int:
        """Ends a title or a document."""
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def unnamed_user(self) -> int:
        """<user>: stands where no <uid> is known or shown."""
        return int(self.tokenizer.convert_tokens_to_ids(UNNAMED_USER))

    @cached_property
    def unnamed_item(self) -> int:
        """<item>: the item whose title stands before it."""
        return int(self.tokenizer.convert_tokens_to_ids(UNNAMED_ITEM))

    @property
    def user_tokens(self) -> range:
        return range(self.n_text, self.n_text + self.n_users)

    @property
    def item_tokens(self) -> range:
        return range(self.n_text + self.n_users, self.n_tokens)

    def user_token(self, user: Array) -> Array:
        """V + user, for one user or an array."""
        return self.n_text + user

    def item_token(self, item: Array) -> Array:
        """V + U + item, for one item or an array."""
        return self.n_text + self.n_users + item

    def items_of(self, tokens: Array) -> np.ndarray:
        """The items named in a token array, in order (text and user tokens are left out)."""
        tokens = np.asarray(tokens)
        first = self.item_tokens.start
        return tokens[tokens >= first] - first

    def encode_text(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts, each to an int32 array; whatever they hold, no special and no id token comes out."""
        backend = self.tokenizer.backend_tokenizer
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True
        try:
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            backend.encode_special_tokens = before
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """Writes tokens as text for people, id tokens as <uid_7> and <iid_7>."""
        pieces, text = [], []
        for token in [*map(int, tokens), None]:
            if token is not None and token < self.n_text:
                text.append(token)
                continue
            pieces.append(self.tokenizer.decode(text, skip_special_tokens=False) if text else "")
            text = []
            if token in self.user_tokens:
                pieces.append(f"<uid_{token - self.user_tokens.start}>")
            elif token in self.item_tokens:
                pieces.append(f"<iid_{token - self.item_tokens.start}>")
        return "".join(pieces)
