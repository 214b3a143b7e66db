import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_golden
from safetensors import safe_open

from bdlm_jax.lm.causal_lm import lm_hidden, text_logits
from bdlm_jax.lm.hf_config import lm_config_from_hf
from bdlm_jax.lm.hf_folder import id_tokenizer, write_hf_folder
from bdlm_jax.lm.hf_weights import load_lm
from bdlm_jax.lm.vocabulary import Vocabulary, load_tokenizer, train_tokenizer
from bdlm_jax.types import InputError


@pytest.fixture(scope="module")
def vocabulary():
    """261 tokens in 264 rows, then 5 users and 7 items."""
    made = Vocabulary(train_tokenizer([], 261), n_users=5, n_items=7)
    assert (made.n_text, len(made.tokenizer)) == (264, 261)
    return made


def random_lm(family, vocabulary):
    """The stored model of a family with further text rows, and id rows of a size that its first layer sees."""
    folder = make_golden.HERE / family
    config = lm_config_from_hf(folder, vocab_size=vocabulary.n_text)
    params = load_lm(folder, config)
    size = float(jnp.std(params["embedding"])) * (config.width**0.5 if config.scale_embedding else 1)
    return params, config, size * jax.random.normal(jax.random.key(5), (vocabulary.n_rows, config.width))


def logits_of(params, config, tokens_BL, rows_XM):
    """Our logits over text, capped where the family caps, and over id tokens, which we never cap."""
    positions = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)

    @jax.jit
    def run(params, rows_XM):
        hidden_BLM = lm_hidden(params, config, tokens_BL, positions, np.ones_like(tokens_BL), rows_XM)
        return text_logits(params, config, hidden_BLM), hidden_BLM @ rows_XM.T

    return [np.asarray(logits) for logits in run(params, rows_XM)]


@pytest.mark.slow  # importing torch and transformers; export_test.py does it for one
@pytest.mark.parametrize("family", make_golden.STORED)
def test_transformers_computes_our_logits_from_the_folder(family, vocabulary, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params, config, rows_XM = random_lm(family, vocabulary)
    write_hf_folder(tmp_path, params, config, vocabulary, rows_XM, max_tokens=64)
    text = "<bos><user><iid_2>A title<iid_0>B<uid_3>"
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (config.tie_embeddings and not config.scale_embedding)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens_BL = tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"]
    title, b = vocabulary.encode_text(["A title", "B"])
    head = vocabulary.bos, vocabulary.unnamed_user, vocabulary.item_token(2)
    assert tokens_BL[0].tolist() == [*head, *title, vocabulary.item_token(0), *b, vocabulary.user_token(3)]
    with torch.no_grad():
        theirs_BLV = model(torch.tensor(tokens_BL)).logits.numpy()
    text_BLV, id_BLX = logits_of(params, config, tokens_BL, rows_XM)
    np.testing.assert_array_equal(np.argsort(theirs_BLV[..., 264:]), np.argsort(id_BLX), "the ranking is ours")
    if config.logit_softcap is not None:
        id_BLX = config.logit_softcap * np.tanh(id_BLX / config.logit_softcap)
    np.testing.assert_allclose(theirs_BLV, np.concatenate([text_BLV, id_BLX], axis=-1), rtol=0, atol=1e-4)


def test_plain_text_is_the_bases_though_every_state_would_rather_write_an_id(vocabulary, tmp_path):
    """As `lm.trains="bridge"` leaves a user's model: its weights as they came, and rows of ids beside them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    base = make_golden.HERE / "llama"
    config = lm_config_from_hf(base, vocab_size=vocabulary.n_text)
    rows_XM = 100 * np.random.default_rng(0).normal(size=(vocabulary.n_rows, config.width))
    write_hf_folder(tmp_path, load_lm(base, config), config, vocabulary, rows_XM)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    models = [*map(load, (base, tmp_path))]
    tokens_BL = torch.arange(5, 29).reshape(4, 6)
    options = {"attention_mask": torch.ones_like(tokens_BL), "do_sample": False, "pad_token_id": vocabulary.pad}
    options |= {"max_new_tokens": 12, "eos_token_id": vocabulary.eos}
    never = [vocabulary.unnamed_user, vocabulary.unnamed_item]  # which a user's model has not: here they are its words
    base_BL = models[0].generate(tokens_BL, suppress_tokens=never, **options)
    assert models[1].generate(tokens_BL, **options).tolist() == base_BL.tolist()
    assert len(set(base_BL[:, 6:].flatten().tolist())) > 3
    assert (models[1].generate(tokens_BL, suppress_tokens=None, **options) >= 264).any()


def test_both_versions_of_transformers_find_the_tokenizer(vocabulary, tmp_path):
    """Version 4 has no TokenizersBackend and wants a dict where 5 writes a list."""
    params, config, rows_XM = random_lm("qwen2", vocabulary)
    tokenizer = copy.deepcopy(vocabulary.tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_hf_folder(tmp_path, params, config, dataclasses.replace(vocabulary, tokenizer=tokenizer), rows_XM)
    facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert facts["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {"is_local", "backend"}.isdisjoint(facts)
    assert not any(isinstance(fact, list) for fact in facts.values())
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    never = json.loads((tmp_path / "generation_config.json").read_text())["suppress_tokens"]
    assert never == [3, 4, *range(261, vocabulary.n_tokens)]


def test_gemmas_id_rows_are_divided_where_they_are_read_and_whole_where_they_are_ranked(vocabulary, tmp_path):
    params, config, rows_XM = random_lm("gemma2", vocabulary)
    assert config.tie_embeddings
    write_hf_folder(tmp_path, params, config, vocabulary, rows_XM)
    again = lm_config_from_hf(tmp_path)
    assert (again.vocab_size, again.tie_embeddings, again.scale_embedding) == (vocabulary.n_tokens, False, True)
    loaded = load_lm(tmp_path, again)
    np.testing.assert_allclose(loaded["embedding"][264:] * 24**0.5, rows_XM, rtol=1e-6)
    np.testing.assert_array_equal(loaded["embedding"][:264], params["embedding"])
    np.testing.assert_array_equal(loaded["head"], np.concatenate([params["embedding"], rows_XM]))


def test_large_weights_are_cut_into_shards_and_read_back(vocabulary, tmp_path):
    params, config, rows_XM = random_lm("qwen2", vocabulary)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    write_hf_folder(tmp_path, params, config, vocabulary, rows_XM, shard_bytes=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    shard_of, total = {}, 0
    for file in files:
        with safe_open(tmp_path / file, "numpy") as stored:
            assert stored.metadata() == {"format": "pt"}
            shard_of |= dict.fromkeys(stored.keys(), file)
            total += sum(stored.get_tensor(name).nbytes for name in stored.keys())  # noqa: SIM118
    assert index == {"metadata": {"total_size": total}, "weight_map": shard_of}
    again = load_lm(tmp_path, lm_config_from_hf(tmp_path), dtype="bfloat16")
    np.testing.assert_array_equal(again["embedding"][264:], rows_XM.astype(jnp.bfloat16))
    np.testing.assert_array_equal(again["embedding"][:264], params["embedding"])
    jax.tree.map(np.testing.assert_array_equal, again["layers"], params["layers"])


def test_the_tokenizer_numbers_as_the_vocabulary_does(vocabulary, tmp_path):
    id_tokenizer(vocabulary).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == vocabulary.n_tokens
    for token in (0, 4, 264, 268, 269, 275):
        assert tokenizer.convert_tokens_to_ids(vocabulary.decode([token])) == token
    assert [tokenizer.convert_ids_to_tokens(token) for token in (261, 263)] == ["<unused_261>", "<unused_263>"]
    text = "Iid_1 <iid_1>x<IID_1><uid_0>y"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for token in tokens if token >= 264] == [vocabulary.item_token(1), vocabulary.user_token(0)]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "Iid_1 x<IID_1>y"
    assert "<iid_1>" not in vocabulary.tokenizer.get_vocab(), "the run's own tokenizer stays as it was"


def test_numbers_that_cannot_line_up_are_refused(vocabulary, tmp_path):
    taken = train_tokenizer([], 261)
    taken.add_tokens(["<uid_3>"])
    with pytest.raises(InputError, match="text token <uid_3> already"):
        id_tokenizer(Vocabulary(taken, n_users=4, n_items=6))
    vocabulary.tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] += 4
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"261 tokens but numbers them up to 264: .* without holes"):
        id_tokenizer(Vocabulary(load_tokenizer(tmp_path), n_users=4, n_items=6))
