import dataclasses
import gzip
import json
import lzma

import numpy as np
import own_lm
import pytest

from bdlm_jax.data import candidates, splits
from bdlm_jax.data.candidates import load_candidates, make_candidates, save_candidates
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION
from bdlm_jax.lm.vocabulary import load_tokenizer, train_tokenizer
from bdlm_jax.run import prepare
from bdlm_jax.run.prepare import prepare_data, prepare_vocabulary
from bdlm_jax.run.ranked import judged_cases
from bdlm_jax.types import InputError, LeakError
from experiments import tiny


@pytest.fixture
def config():
    return tiny.get_config()


@pytest.fixture
def table(tmp_path, config):
    """A config of a table of 12 users and 10 items, the item i9 only in the last user's last place."""
    generator = np.random.default_rng(0)
    lines = ["user,item,time,rating"]
    for user in range(12):
        items = [*generator.permutation(9)[:5], *([9] if user == 11 else [])]
        lines += [f"u{user},i{item},{time},{4 if time else 3}" for time, item in enumerate(items)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    config.data.kind, config.data.path, config.data.options = "table", str(path), {}
    config.data.candidates, config.data.titles = {"cand3": 2}, "none"
    config.models, config.evaluate.protocols, config.evaluate.text_protocols = ("item_pop", "ids_lm"), ("cand3",), ()
    return config


def test_a_second_start_finds_the_same_data(config, tmp_path):
    first = prepare_data(config, tmp_path / "data")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.npz")}
    again = prepare_data(config, tmp_path / "data")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.npz")}
    assert json.loads(json.dumps(again.fingerprint)) == json.loads((tmp_path / "data" / "fingerprint.json").read_text())
    for part in ("validation", "test"):
        frozen = load_candidates(tmp_path / "data" / f"{part}_cand20.npz")
        hashes = {frozen.sha256, first.fingerprint["candidates"][f"{part}/cand20"]}
        assert hashes == {again.candidates[part]["cand20"].sha256}
    assert set(first.slices) == {"all", "warm", "twins", "cold", "knowledge"}
    new_I = first.slices["cold"] | first.slices["knowledge"]
    assert first.slices["all"].all() and new_I.any() and np.array_equal(first.slices["warm"], ~new_I)
    assert len(first.item_texts) == first.n_items and first.user_texts is None
    assert first.corpus == first.world.corpus


def test_candidates_of_drawn_cases_are_for_those_that_the_full_ranking_tests(table, tmp_path):
    table.evaluate.cases = 5
    data = prepare_data(table, tmp_path / "data")
    drawn = judged_cases(table, data.split, "test")
    assert len(drawn) == 5 and data.fingerprint["judged"] == {"validation": 5, "test": 5}
    made = data.candidates["test"]["cand3"]
    for column, values in zip((made.user_N, made.items_NC[:, 0]), data.split.cases(TEST)):
        np.testing.assert_array_equal(column, values[drawn])
    table.evaluate.cases = 0
    assert "judged" not in prepare_data(table, tmp_path / "whole").fingerprint


def test_a_table_is_kept_where_the_config_says(table, tmp_path):
    table.runtime.kept_data = str(tmp_path / "kept")
    first, again = (prepare_data(table, tmp_path / name) for name in ("first", "again"))
    assert first.fingerprint == again.fingerprint
    assert len([*(tmp_path / "kept").iterdir()]) == 1


def test_seeds_of_models_share_their_candidates_and_the_candidates_have_a_seed_of_their_own(table, tmp_path):
    def hashes(seed, candidates_seed):
        table.seed, table.data.candidates_seed = seed, candidates_seed
        return prepare_data(table, tmp_path / f"{seed}_{candidates_seed}").fingerprint["candidates"]

    assert hashes(0, 0) == hashes(1, 0)
    assert not set(hashes(0, 0).values()) & set(hashes(0, 1).values())


def test_candidates_redrawn_between_two_starts_are_refused(config, tmp_path):
    data = prepare_data(config, tmp_path)
    other = make_candidates(data.split, TEST, n_negatives=19, seed=9, name="cand20")
    save_candidates(tmp_path / "test_cand20.npz", other)
    with pytest.raises(InputError, match="was written for other data"):
        prepare_data(config, tmp_path)


def test_validation_negatives_at_test_stop_a_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "stream_seed", lambda seed, part, name: seed)  # as it was: one draw for both parts
    with pytest.raises(LeakError, match="test shares"):
        prepare_data(config, tmp_path)


def test_other_data_in_a_begun_folder_are_refused(config, tmp_path):
    prepare_data(config, tmp_path)
    config.seed = 1
    with pytest.raises(InputError, match=r"fingerprint.json was written for other data"):
        prepare_data(config, tmp_path)


def test_a_table_has_a_cold_slice_of_what_nobody_had_before_test(table, tmp_path):
    data = prepare_data(table, tmp_path / "data")
    cold = np.flatnonzero(data.slices["cold"])
    assert [data.split.interactions.item_ids[i] for i in cold] == ["i9"]
    assert data.world is None and data.corpus == []
    assert data.candidates["test"]["cand3"].items_NC.shape == (12, 3)


def test_ratings_and_core_are_filtered(table, tmp_path):
    table.data.min_rating = 4.0
    table.data.min_item = 2
    data = prepare_data(table, tmp_path / "data")
    item = data.split.interactions.item_E
    assert data.fingerprint["interactions"] == len(item) <= 12 * 4
    assert np.bincount(item).min() >= 2


@pytest.mark.parametrize("split", ["global_time", "ratio"])
def test_the_split_of_the_config_is_taken(table, tmp_path, split):
    table.data.split, table.data.validation, table.data.test = split, 0.2, 0.2
    data = prepare_data(table, tmp_path / "data")
    shares = np.bincount(data.split.part_E, minlength=3) / len(data.split.part_E)
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.2], atol=0.1)
    assert data.split.degree(TRAIN).sum() == data.fingerprint["parts"]["train"]


@pytest.mark.parametrize("split", ["ratio", "cold_items"])
def test_a_random_split_has_a_seed_of_its_own(table, tmp_path, split):
    table.data.split, table.data.validation, table.data.test, table.data.cold_share = split, 0.2, 0.2, 0.5

    def parts(seed, split_seed):
        table.seed, table.data.split_seed = seed, split_seed
        return prepare_data(table, tmp_path / f"{seed}_{split_seed}").split.part_E.tolist()

    assert parts(0, 0) == parts(1, 0) != parts(0, 1)


def test_cold_items_are_asked_for_among_each_other_too(table, tmp_path):
    table.data.split, table.data.cold_share = "cold_items", 0.5
    data = prepare_data(table, tmp_path / "data")
    assert np.array_equal(data.slices["warm"], ~data.slices["cold"]) and data.slices["warm"].any()
    for part, known in (("validation", (TRAIN,)), ("test", (TRAIN, VALIDATION))):
        cold_I = data.split.degree(*known) == 0
        target_N = data.split.cases({"validation": VALIDATION, "test": TEST}[part])[1]
        cold20 = data.candidates[part]["cold20"]
        assert len(cold20) == cold_I[target_N].sum() > 0
        items = cold20.items_NC[cold20.items_NC >= 0]
        assert cold_I[items].all() and np.isin(items, target_N).all()
        assert data.fingerprint["candidates"][f"{part}/cold20"] == cold20.sha256


def test_a_cold_item_in_training_stops_a_run(table, tmp_path, monkeypatch):
    table.data.split, table.data.cold_share = "cold_items", 0.5
    right = splits.cold_items

    def wrong(table, *, share, seed):  # other items than those that are called cold
        return right(table, share=share, seed=seed + 1)

    monkeypatch.setattr(splits, "cold_items", wrong)
    with pytest.raises(LeakError, match="have interactions before it"):
        prepare_data(table, tmp_path / "data")


def test_a_part_without_cases_stops_what_needs_it(table, tmp_path):
    table.data.split, table.data.validation, table.data.test = "ratio", 0.1, 0.2  # of 5 interactions: none, and one
    with pytest.raises(InputError, match="the validation part of the data has no interaction to predict"):
        prepare_data(table, tmp_path / "data")
    table.models = ("item_pop",)
    data = prepare_data(table, tmp_path / "data")
    assert [len(data.candidates[part]["cand3"]) for part in ("validation", "test")] == [0, 12]
    table.data.validation, table.data.test = 0.2, 0.1
    with pytest.raises(InputError, match="the test part of the data has no interaction to predict"):
        prepare_data(table, tmp_path / "other")


def test_a_corpus_is_read_as_far_as_its_limit(table, tmp_path):
    path = tmp_path / "corpus.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("one two three\n\nfour five\nsix\n" + "more and more\n" * 100)
    table.pretrain.corpus, table.pretrain.max_tokens = str(path), 6
    assert prepare_data(table, tmp_path / "data").corpus == ["one two three", "four five", "six"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.txt", None),
        ("binary.txt", b"text\0more"),
        ("latin.txt", "café".encode("latin-1")),
        ("cut.gz", gzip.compress(b"a line\n" * 9)[:-9]),
        ("plain.gz", b"a line"),
        ("cut.xz", lzma.compress(b"a line\n" * 9)[:-9]),
        ("plain.xz", b"a line"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip writes the time: two processes would differ
)
def test_a_corpus_that_is_no_whole_text_is_refused(table, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    table.pretrain.corpus = str(tmp_path / name)
    message = rf"config.pretrain.corpus: .*{name} cannot be read \(.+\); give a whole UTF-8"
    with pytest.raises(InputError, match=message):
        prepare_data(table, tmp_path / "data")


def test_the_tokenizer_is_trained_once(config, tmp_path):
    data = prepare_data(config, tmp_path / "data")
    first = prepare_vocabulary(config, data, tmp_path / "tokenizer")
    data = data._replace(item_texts=["other words"] * data.n_items)
    again = prepare_vocabulary(config, data, tmp_path / "tokenizer")
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert (again.n_users, again.n_items) == (data.n_users, data.n_items)
    title = data.world.corpus[0]
    assert first.encode_text([title])[0].tolist() == again.encode_text([title])[0].tolist()


def test_a_users_model_brings_its_own_tokenizer_untouched(config, tmp_path):
    own_lm.write_model(tmp_path / "model", dataclasses.replace(own_lm.LLAMA, vocab_size=301))
    config.lm.path = str(tmp_path / "model")
    data = prepare_data(config, tmp_path / "data")
    made = prepare_vocabulary(config, data, tmp_path / "tokenizer")
    assert made.n_text == 304  # the model's 301 rows, rounded up to 8, though the tokenizer has fewer tokens
    assert made.tokenizer.chat_template == own_lm.TEMPLATE
    assert len({made.pad, made.bos, made.eos, made.unnamed_user, made.unnamed_item}) == 5
    assert not (tmp_path / "tokenizer").exists()
    own = load_tokenizer(tmp_path / "model")
    assert made.tokenizer.get_vocab() == own.get_vocab()
    config.tokenizer.path = str(tmp_path / "other")
    train_tokenizer(["other words"], 262).save_pretrained(config.tokenizer.path)
    other = prepare_vocabulary(config, data, tmp_path / "tokenizer")
    assert len(other.tokenizer) < len(own) and other.n_text == 304


def test_padding_never_is_a_models_end(tmp_path):
    tokenizer = train_tokenizer(own_lm.WORDS, 270)
    tokenizer.pad_token = tokenizer.eos_token  # as GPT-2's users do
    own_lm.write_model(tmp_path, own_lm.GPT2, tokenizer=tokenizer)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token == "<eos>" and loaded.pad_token_id != loaded.eos_token_id


def test_cut_titles_are_counted_and_remembered(config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(prepare._LOG, "propagate", True)
    data = prepare_data(config, tmp_path / "data")
    made = prepare_vocabulary(config, data, tmp_path / "tokenizer")
    longest = [len(title) for title in made.encode_text(data.item_texts)]
    config.prompts.max_title_tokens = max(longest) - 1
    with caplog.at_level("INFO", logger="bdlm_jax"):
        texts = prepare.encode_texts(config, data, made)
    assert texts.cut == {item for item, n in enumerate(longest) if n == max(longest)}
    assert f"{len(texts.cut)} of {len(longest)} titles are longer" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("word", "name", "wanted"),
    [
        ("always", "model", True),
        ("auto", "model-Instruct", True),
        ("auto", "models--a--model-it/snapshots/0a1b", True),
        ("auto", "model", False),
        ("auto", "chats/instruct/model", False),
        ("never", "a-it", False),
    ],
)
def test_who_talks_by_the_template(config, tmp_path, word, name, wanted):
    own_lm.write_model(tmp_path / name, own_lm.LLAMA)
    config.lm.path, config.prompts.chat = str(tmp_path / name), word
    data = prepare_data(config, tmp_path / "data")
    made = prepare_vocabulary(config, data, tmp_path / "tokenizer")
    assert bool(made.chat) == wanted
    assert made.decode(made.head).startswith("user: Which items" if wanted else "<bos>")


def test_a_conversation_that_leaves_no_room_is_refused(config, tmp_path):
    own_lm.write_model(tmp_path / "model", own_lm.LLAMA)
    config.lm.path, config.prompts.chat, config.prompts.length = str(tmp_path / "model"), "always", 40
    data = prepare_data(config, tmp_path / "data")
    with pytest.raises(InputError, match=r"prompts\.length 40 cannot hold one title behind the \d+ tokens"):
        prepare_vocabulary(config, data, tmp_path / "tokenizer")
    config.lm.path = ""
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        prepare_vocabulary(config, data, tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("asked", "n_items", "drawn"),
    [(0, 50_000, 0), (0, 50_001, 4096), (-1, 50_001, 0), (1024, 2000, 1024), (1024, 10**6, 1024)],
)
def test_a_softmax_is_drawn_where_it_is_asked_for_or_the_catalogue_is_large(caplog, asked, n_items, drawn):
    with caplog.at_level("INFO"):
        assert prepare.drawn_items(asked, n_items, told="sasrec") == drawn
    told = "sasrec: 4096 of the 50001 items are drawn for each batch's softmax"
    assert (told in caplog.text) == (drawn == 4096)
