import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bdlm_jax.lm.vocabulary import Vocabulary, load_tokenizer, train_tokenizer
from bdlm_jax.types import InputError

TEXTS = ["the red shoe", "the blue shoe, red laces", "a film (1999)", "<item> of the <user>: <iid_7>"] * 20
SPECIALS = {0, 1, 2, 3, 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, 12, 25)


def test_a_word_without_end_teaches_no_more_than_its_beginning():
    whole, cut = (train_tokenizer([*TEXTS, "ab" * n], 300).get_vocab() for n in (3000, 500))
    assert whole == cut


def test_id_tokens_stand_behind_the_rounded_text_vocabulary(vocabulary, tokenizer):
    n_tokens = max(tokenizer.get_vocab().values()) + 1
    assert vocabulary.n_text % 8 == 0 and 0 <= vocabulary.n_text - n_tokens < 8
    assert vocabulary.user_token(3) == vocabulary.n_text + 3
    assert vocabulary.item_token(5) == vocabulary.n_text + 12 + 5
    assert vocabulary.n_rows == 12 + 25 and vocabulary.n_tokens == vocabulary.n_text + 37
    np.testing.assert_array_equal(vocabulary.item_token(np.arange(2)), vocabulary.n_text + 12 + np.arange(2))
    # A model with more rows than its tokenizer has tokens keeps them.
    assert Vocabulary(tokenizer, 1, 1, min_text=1001).n_text == 1008


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4))
@example(["<pad>", "<iid_7>", "the <item> <user>", "<bos><eos>", " <pad> "])
def test_any_text_comes_back_and_yields_no_special_and_no_id_token(vocabulary, texts):
    encoded = vocabulary.encode_text(texts)
    assert [vocabulary.decode(tokens) for tokens in encoded] == texts
    assert all(tokens.dtype == np.int32 and tokens.max(initial=0) < vocabulary.n_text for tokens in encoded)
    assert all(not SPECIALS & set(tokens.tolist()) for tokens in encoded)


def test_encoding_leaves_the_tokenizer_as_it_was(vocabulary, tokenizer):
    before = tokenizer("a <item>", add_special_tokens=False)["input_ids"]
    vocabulary.encode_text(["a <item>"])
    assert tokenizer("a <item>", add_special_tokens=False)["input_ids"] == before
    assert before[-1] == vocabulary.unnamed_item


def test_decode_names_ids(vocabulary):
    tokens = [vocabulary.bos, vocabulary.user_token(3), *vocabulary.encode_text(["red"])[0], vocabulary.item_token(19)]
    assert vocabulary.decode(tokens) == "<bos><uid_3>red<iid_19>"
    np.testing.assert_array_equal(vocabulary.items_of(tokens), [19])


def test_a_saved_tokenizer_loads_equal_and_without_torch(vocabulary, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = Vocabulary(load_tokenizer(tmp_path), 12, 25)
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    for v in (vocabulary, again):
        assert (v.pad, v.bos, v.eos, v.unnamed_user, v.unnamed_item) == (0, 1, 2, 3, 4)
    np.testing.assert_array_equal(again.encode_text(["the <item>"])[0], vocabulary.encode_text(["the <item>"])[0])
    # AutoTokenizer would import torch.
    code = (
        "import sys; from bdlm_jax.lm.vocabulary import load_tokenizer; "
        "load_tokenizer(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@pytest.mark.parametrize("end", [True, False])
def test_two_gpt2_files_load_and_missing_specials_are_added(tmp_path, tokenizer, end):
    # The BPE itself, as GPT-2 publishes it: without declared special tokens.
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)[len(SPECIALS) :] + ["<|endoftext|>"] * end
    count = len(tokens)
    (tmp_path / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}), encoding="utf-8")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    vocabulary = Vocabulary(load_tokenizer(tmp_path), 2, 3)
    if end:
        assert vocabulary.bos == vocabulary.eos == count - 1
    ends = {vocabulary.bos, vocabulary.eos}
    added = {vocabulary.pad, vocabulary.unnamed_user, vocabulary.unnamed_item} | (set() if end else ends)
    assert added == set(range(count, count + (3 if end else 5)))
    text = "the red shoe <|endoftext|> <pad>"
    [tokens] = vocabulary.encode_text([text])
    assert not (added | {vocabulary.eos}) & set(tokens.tolist())
    assert vocabulary.decode(tokens) == text


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=str(tmp_path.name)):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="at least 261"):
        train_tokenizer(TEXTS, 260)
