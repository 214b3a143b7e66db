"""What the LM says of unfamiliar titles: of whom it is asked, what it writes, and where that is read."""

import json

import jax
import numpy as np
import pytest

from bdlm_jax.lm.causal_lm import init_lm
from bdlm_jax.lm.generate import generate
from bdlm_jax.run import build, checks, contenders, glosses, rows
from bdlm_jax.types import InputError
from experiments import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = tiny.get_config()
    config.prompts.gloss = "{} means"
    return build.start_run(config, tmp_path_factory.mktemp("glosses"))


@pytest.fixture
def run(made):
    (made.root / "data" / "glosses.json").unlink(missing_ok=True)
    return made


def decoder(run):
    return build.make_decoder(run, init_lm(jax.random.key(5), run.lm))


def test_an_item_is_unfamiliar_by_a_token_that_no_warm_title_has():
    titles = [np.array(tokens, np.int32) for tokens in ([1, 2], [2, 3], [1, 3], [3, 4], [], [5])]
    assert glosses.unfamiliar_items(titles, np.array([1, 1, 0, 0, 0, 1], bool)).tolist() == [3]
    assert glosses.unfamiliar_items(titles, np.zeros(6, bool)).tolist() == [0, 1, 2, 3, 5]


def test_the_knowledge_items_of_the_twins_world_are_unfamiliar_and_no_warm_item_is(run):
    found = set(glosses.unfamiliar_items(run.texts.titles, run.warm_I).tolist())
    assert found >= set(np.flatnonzero(run.data.world.item_slices["knowledge"]).tolist())
    assert not found & set(np.flatnonzero(run.warm_I).tolist())


def test_the_answer_is_what_the_lm_writes_behind_each_question_alone(run):
    questions, v = ["lamp means", "the old rug", *["a clock is"] * 70], run.texts.vocabulary
    said = glosses.write_glosses(run, decoder(run), questions)
    assert len(said) == len(questions) and any(said)
    for question, answer in list(zip(questions, said))[:3]:
        tokens_BL = np.append(v.bos, v.encode_text([question])[0])[None].astype(np.int32)
        options = {"max_new": run.config.prompts.max_title_tokens, "eos": v.eos, "pad": v.pad}
        allowed_V = jax.numpy.asarray(glosses.own_tokens(run))
        params = decoder(run).params
        text_T = generate(params, run.lm, tokens_BL, np.ones_like(tokens_BL, bool), allowed_V=allowed_V, **options)[0]
        assert answer == v.decode([t for t in np.asarray(text_T) if t not in (v.pad, v.eos)]).strip()


def test_glosses_stand_on_cards_alone_and_are_asked_for_once(run, monkeypatch):
    asked = []

    def answer(run, decoder, questions):
        asked.append(questions)
        return ["lamp", *[""] * (len(questions) - 1)]

    monkeypatch.setattr(glosses, "write_glosses", answer)
    first, *rest = glosses.unfamiliar_items(run.texts.titles, run.warm_I)
    found = glosses.with_glosses(run, None)
    assert asked == [[f"{run.data.item_texts[item]} means" for item in (first, *rest)]]
    v, cards = run.texts.vocabulary, found.texts.cards
    assert v.decode(cards[first]) == "lamp"
    assert all(cards[item] is run.texts.titles[item] for item in range(len(cards)) if item != first)
    assert found.texts.titles is run.texts.titles
    before, after = rows.card_rows(run), rows.card_rows(found)
    assert not np.array_equal(before.tokens, after.tokens)
    assert np.array_equal(rows.card_rows(run, named=True).tokens, rows.card_rows(found, named=True).tokens)
    again = glosses.with_glosses(run, None)
    assert len(asked) == 1 and all(map(np.array_equal, again.texts.cards, cards))
    assert json.loads((run.root / "data" / "glosses.json").read_text())[run.data.item_texts[first]] == "lamp"


def test_nothing_is_asked_without_a_question_or_without_unfamiliar_words(run, tmp_path):
    assert glosses.with_glosses(run.variant("bdlm_unglossed", {"prompts.gloss": ""}), None).texts.cards is None


def test_bdlm_and_its_controls_read_the_glosses(run, monkeypatch):
    def stop(own, *_):
        raise InterruptedError(own)

    monkeypatch.setattr(glosses, "write_glosses", lambda run, decoder, questions: ["lamp"] * len(questions))
    monkeypatch.setattr(contenders.teachers, "learn_together", stop)
    for word, glossed in (("bdlm", True), ("bdlm_to_lm", True), ("bdlm_unglossed", False)):
        with pytest.raises(InterruptedError) as told:
            contenders.train_bdlm(run, lambda: None, word)
        assert (told.value.args[0].texts.cards is not None) == glossed, word


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prompts.gloss": "means"}, r"prompts\.gloss"),
        ({"prompts.gloss": "{} or {}"}, r"prompts\.gloss"),
        ({"prompts.gloss": "{} means", "pretrain.epochs": 0.0}, "has read nothing"),
    ],
)
def test_a_question_has_one_place_for_the_title_and_a_model_that_has_read(settings, told, tmp_path):
    config = tiny.get_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(InputError, match=told):
        checks.check_config(config)
