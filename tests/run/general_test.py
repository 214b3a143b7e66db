"""The general text of an own model: drawn once from the model itself, or of the user's corpus."""

import json

import jax
import numpy as np
import own_lm
import pytest

from bdlm_jax.lm import lora, vocabulary
from bdlm_jax.run import build, forecast, general, stages
from bdlm_jax.run.build import Decoder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, own_lm.write_model(folder, own_lm.LLAMA)


@pytest.fixture
def run(model, tmp_path):
    run = own_lm.make_run(tmp_path, path=str(model[0]), trains="lora", row_std=0.0)
    run.config.pretrain.samples = 11
    return run


def test_the_model_writes_texts_once_and_some_are_held_out(run):
    decoder = build.make_decoder(run, build.load_decoder(run))
    texts, v = general.own_samples(run, decoder), run.texts.vocabulary
    assert len(texts) == 11 and all(text[0] == v.bos and len(text) <= 64 for text in texts)
    assert max(int(text.max()) for text in texts) < len(v.tokenizer)
    assert not {v.pad, v.unnamed_user, v.unnamed_item} & set(np.concatenate(texts).tolist())
    assert len({tuple(text.tolist()) for text in texts}) == 11
    found = general.general_text(run.variant("part", {}), Decoder(None, 1.0))  # read, not drawn: no weights are asked
    assert found.source == "the model's own samples"
    packed = [set(rows.tokens[rows.segments > 0].tolist()) for rows in (found.replay, found.held_out)]
    wanted = [set(np.concatenate(some).tolist()) for some in (texts[1:8] + texts[9:], texts[::8])]
    assert packed == wanted


def test_behind_a_beginning_of_ours_the_first_token_is_drawn(run, monkeypatch):
    monkeypatch.setattr(general, "count_tokens", lambda folder: run.texts.vocabulary.bos)
    texts = general.own_samples(run, build.make_decoder(run, build.load_decoder(run)))
    assert len({int(text[1]) for text in texts}) > 6


def test_a_corpus_is_the_general_text_and_a_part_of_it_is_held_out(model, tmp_path):
    documents = [f"text number {number}" for number in range(40)]
    (tmp_path / "corpus.txt").write_text("\n".join(documents))
    config = own_lm.make_run(tmp_path / "first", path=str(model[0])).config
    config.pretrain.corpus = str(tmp_path / "corpus.txt")
    run = build.start_run(config, tmp_path / "run")
    assert len(run.data.held_out) == 40 // 20 and sorted([*run.data.corpus, *run.data.held_out]) == sorted(documents)
    text = general.general_text(run, Decoder(None, 1.0))
    assert text.source == "the corpus" and len(text.replay) > len(text.held_out) > 0
    config.lm.path = ""
    assert build.start_run(config, tmp_path / "scratch").data.held_out == []


def test_a_model_that_lost_language_is_warned_of(run, caplog, monkeypatch):
    monkeypatch.setattr(general._LOG, "propagate", True)
    decoder = build.make_decoder(run, build.load_decoder(run))
    with caplog.at_level("INFO", logger="bdlm_jax"):
        same = general.measure(run, decoder, decoder.params)
        assert same["before"] == same["after"] and not [r for r in caplog.records if r.levelname == "WARNING"]
        other = jax.tree.map(lambda leaf: 30 * leaf, decoder.params)
        told = general.measure(run, decoder, other)
    assert told["after"] > 1.1 * told["before"] == 1.1 * same["before"]
    assert json.loads(json.dumps(told)) == told and told["tokens"] > 0
    assert "lost language" in caplog.records[-1].getMessage()
    run.config.lm.path = ""
    assert general.measure(run, decoder, other) is None


def test_where_the_base_speaks_nothing_is_replayed_and_its_perplexity_stays_to_the_bit(run, caplog, monkeypatch):
    monkeypatch.setattr(general._LOG, "propagate", True)
    run.config.lm.speaks = "base"
    loaded = build.load_decoder(run)
    decoder = build.make_decoder(run, {**loaded, "head": 30 * loaded["head"]})  # has language to lose
    text = general.general_text(run, decoder)
    assert text.replay is None and len(general.own_samples(run, decoder)) == -(-11 // 8)
    start = build.init_tables(run, "lightgcn", build.make_arm(run, "lightgcn"))
    monkeypatch.setattr(build.Run, "fit", lambda self, stage, **arguments: arguments)
    rows = [stages.train_bdlm(run, decoder, start)["phases"][0].units, forecast.work(run, "bdlm")]
    run.config.pretrain.replay_share = 0.0
    assert rows == [stages.train_bdlm(run, decoder, start)["phases"][0].units, forecast.work(run, "bdlm")]

    adapters = lora.init_lora(jax.random.key(0), decoder.params, rank=2, targets=".*_proj/kernel", alpha=400.0)
    moved = {**decoder.params, "bridge": {}, "lora": jax.tree.map(lambda leaf: leaf + 0.5, adapters)}
    with caplog.at_level("INFO", logger="bdlm_jax"):
        told = general.measure(run, decoder, moved)
    assert told["before"] == told["after"] == general.spoken(run, text, moved)["perplexity"]
    run.config.lm.speaks = "trained"
    assert told["adapters"] == general.spoken(run, text, moved)["perplexity"] > 1.1 * told["before"]
    said = [record.getMessage() for record in caplog.records]
    assert (
        said[-1] == f"with the adapters left on, which recommend and do not write, it would be {told['adapters']:.2f}"
    )
    assert not any("lost language" in line for line in said)
    assert "adapters" not in general.measure(run, decoder, moved)


def test_replay_is_of_the_general_text(run, monkeypatch):
    monkeypatch.setattr(build.Run, "fit", lambda self, stage, **arguments: arguments)
    run.config.pretrain.replay_share = 1.0
    decoder = build.make_decoder(run, build.load_decoder(run))
    start = build.init_tables(run, "lightgcn", build.make_arm(run, "lightgcn"))
    with_it = stages.train_bdlm(run, decoder, start)["phases"][0].units
    run.config.pretrain.replay_share = 0.0
    assert with_it > stages.train_bdlm(run, decoder, start)["phases"][0].units


CHATS = {  # the shape of a family's conversation, and what its head must be
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama": (
        "<bos>{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ date_string }} {{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}",
        "<bos><|h|>user<|/h|>\n\n01 Jan 2024 hi<|eot|><|h|>assistant<|/h|>\n\n",
    ),
    "mistral": ("<bos>{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "<bos>[INST] hi [/INST]"),
    "gemma": (
        "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    ),
}


@pytest.mark.parametrize("family", CHATS)
def test_the_head_of_a_conversation(family):
    tokenizer = vocabulary.train_tokenizer(own_lm.WORDS, 270)
    tokenizer.chat_template, wanted = CHATS[family]
    head = vocabulary.chat_head(tokenizer, "hi")
    assert tokenizer.decode(head, skip_special_tokens=False) == wanted
    assert (head[0] == tokenizer.bos_token_id) == wanted.startswith("<bos>")
