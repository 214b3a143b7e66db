from types import SimpleNamespace

import numpy as np
import pytest

from bdlm_jax.data.interactions import make_interactions
from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, leave_one_out
from bdlm_jax.lm import packing
from bdlm_jax.lm.vocabulary import Vocabulary
from bdlm_jax.run import rows
from bdlm_jax.run.prepare import Texts
from bdlm_jax.run.ranked import KNOWN
from experiments import tiny

N_USERS, N_ITEMS, LENGTH = 12, 40, 16
GENERATOR = np.random.default_rng(4)

PAIRS = [(u, i) for u in range(N_USERS) for i in GENERATOR.permutation(N_ITEMS)[: 4 + 2 * u]]
PAIRS += [(N_USERS - 1, i) for i in range(N_ITEMS)]  # the last user has everything, so that all items exist
SPLIT = leave_one_out(make_interactions(*zip(*PAIRS), time=range(len(PAIRS))))
DATA = SimpleNamespace(split=SPLIT, n_users=N_USERS, n_items=N_ITEMS)
VOCABULARY = Vocabulary(None, N_USERS, N_ITEMS)
VOCABULARY.__dict__.update(n_text=64, pad=0, bos=1, eos=2, unnamed_user=3, unnamed_item=4)
TITLES = [np.arange(5 + i, 6 + i + i % 4, dtype=np.int32) for i in range(N_ITEMS)]
TEXTS = Texts(VOCABULARY, TITLES, None)


@pytest.fixture
def run():
    config = tiny.get_config()
    config.prompts.length, config.prompts.max_items = LENGTH, 6
    return SimpleNamespace(config=config, data=DATA, texts=TEXTS)


def history(user, *parts):
    indptr, item = SPLIT.histories(*parts)
    return item[indptr[user] : indptr[user + 1]].tolist()


@pytest.fixture
def packed_prompts(monkeypatch):
    """The prompts that were last given to `pack`, in their order."""
    given, pack = [], packing.pack

    def recorded(prompts, *args, **options):
        given[:] = prompts
        return pack(prompts, *args, **options)

    monkeypatch.setattr(packing, "pack", recorded)
    return given


@pytest.mark.parametrize("kind", ["ids", "ids_titles"])
@pytest.mark.parametrize("user_token", ["start", "end", "none"])
def test_windows_show_every_training_interaction_once_and_no_other(run, kind, user_token, packed_prompts):
    run.config.prompts.user_token = user_token
    rows.training_rows(run, kind=kind)
    windows = [
        (VOCABULARY.items_of(prompt.tokens).tolist(), prompt.item_targets[prompt.item_targets >= 0].tolist())
        for prompt in packed_prompts
    ]
    for user in range(N_USERS):
        left = wanted = history(user, TRAIN)
        # Windows come from the history's end; all but its first item are predicted, and the very first where it begins.
        while left:
            shown, targets = windows.pop(0)
            assert shown == left[-len(shown) :] and 0 < len(shown) <= 6
            left = left[: -len(shown)]
            assert targets == (shown if not left else shown[1:])
        assert not set(wanted) & set(history(user, VALIDATION, TEST))
    assert not windows


def test_windows_are_as_long_as_a_row_allows(run, packed_prompts):
    run.config.prompts.max_items = 100
    rows.training_rows(run, kind="ids_titles")
    shown = [VOCABULARY.items_of(prompt.tokens) for prompt in packed_prompts]
    at = 0
    for user in range(N_USERS):
        stop = len(history(user, TRAIN))
        while stop:
            start = stop - len(shown[at])
            sizes = [1 + len(TITLES[i]) for i in history(user, TRAIN)]
            assert 2 + sum(sizes[start:stop]) <= LENGTH
            assert start == 0 or 2 + sum(sizes[start - 1 : stop]) > LENGTH
            stop, at = start, at + 1


def test_every_user_is_read_once_behind_the_whole_training_history(run):
    check_reads(rows.training_rows(run, kind="ids"), TRAIN)


def check_reads(packed, *parts, named=True):
    row, slot = np.nonzero(packed.user >= 0)
    assert sorted(packed.user[row, slot].tolist()) == list(range(N_USERS))
    for r, s in zip(row, slot):
        user, at = int(packed.user[r, s]), int(packed.user_index[r, s])
        segment = packed.segments[r, at]
        inside = np.flatnonzero(packed.segments[r] == segment)
        assert at == inside[-1]
        assert VOCABULARY.items_of(packed.tokens[r, inside]).tolist() == history(user, *parts)[-6:]
        shown = VOCABULARY.user_token(user) if named else VOCABULARY.unnamed_user
        assert packed.tokens[r, inside[1]] == shown


@pytest.mark.parametrize(("part", "named"), [("validation", True), ("test", False)])
def test_reading_rows_end_with_the_last_known_item(run, part, named, packed_prompts):
    run.config.prompts.read_named, parts = named, KNOWN[part]
    packed = rows.reading_rows(run, kind="ids", part=part)
    check_reads(packed, *parts, named=named)
    assert len(packed_prompts) == N_USERS
    for user, prompt in enumerate(packed_prompts):
        assert VOCABULARY.items_of(prompt.tokens)[-1] == history(user, *parts)[-1]


def test_text_rows_name_no_item(run):
    packed = rows.training_rows(run, kind="text")
    assert packed.tokens.max() < VOCABULARY.n_text and not (packed.item_target >= 0).any()
    assert (packed.tokens == VOCABULARY.eos).sum() == len(SPLIT.edges(TRAIN)[0])


def test_cards_read_every_item_once_without_naming_it(run):
    packed = rows.card_rows(run)
    row, slot = np.nonzero(packed.card_item >= 0)
    assert sorted(packed.card_item[row, slot].tolist()) == list(range(N_ITEMS))
    assert not len(VOCABULARY.items_of(packed.tokens))
    assert (packed.tokens[row, packed.card_index[row, slot]] == VOCABULARY.unnamed_item).all()
    named = rows.card_rows(run, named=True)
    assert sorted(VOCABULARY.items_of(named.tokens).tolist()) == list(range(N_ITEMS))
    assert not (named.card_item >= 0).any()
    assert (packed.text_target >= 0).any()
    run.config.lm.path = "model"  # which must not come to expect titles behind <bos>
    read, said = rows.card_rows(run), rows.card_rows(run, named=True)
    np.testing.assert_array_equal(read.tokens, packed.tokens)
    assert not (read.text_target >= 0).any()
    np.testing.assert_array_equal(said.text_target, named.text_target)


def test_mix_takes_whole_copies_and_a_drawn_part(run):
    cards = rows.card_rows(run)
    histories = rows.training_rows(run, kind="ids")
    parts = [(cards, 2.5), (None, 3), (histories, 1), (histories, 0)]
    mixed = rows.mix(parts, seed=0)
    part = round(0.5 * len(cards))
    assert len(mixed) == 2 * len(cards) + part + len(histories)
    np.testing.assert_array_equal(mixed.tokens[: 2 * len(cards)], np.tile(cards.tokens, (2, 1)))
    drawn = {row.tobytes() for row in mixed.tokens[2 * len(cards) :][:part]}
    assert len(drawn) == part and drawn < {row.tobytes() for row in cards.tokens}
    np.testing.assert_array_equal(rows.mix(parts, seed=0).tokens, mixed.tokens)


def test_text_prefixes_hold_the_last_titles(run):
    run.config.evaluate.text_history = 3
    tokens, mask = rows.text_prefixes(run, part="test")
    for user in range(N_USERS):
        last = history(user, TRAIN, VALIDATION)[-3:]
        wanted = [VOCABULARY.bos, *(t for i in last for t in [*TITLES[i], VOCABULARY.eos])]
        assert tokens[user][mask[user]].tolist() == wanted
    titles, mask = rows.title_continuations(run)
    assert [t[m].tolist() for t, m in zip(titles, mask)] == [[*title, VOCABULARY.eos] for title in TITLES]


def test_a_context_stands_before_the_titles_but_not_before_bare_ids(run, packed_prompts):
    context = np.array([60, 61], np.int32)
    run.texts = TEXTS._replace(contexts=[context] * N_USERS)
    run.config.prompts.length = 24
    for kind, wanted in (("ids_titles", True), ("ids", False)):
        rows.reading_rows(run, kind=kind, part="validation")
        for prompt in packed_prompts:
            assert (prompt.tokens[2:4].tolist() == [60, 61]) == wanted
