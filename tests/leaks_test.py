"""Leaks, each planted where a bug would be on a real small run: a guard stops the stage before anything is trained.

Candidates that are redrawn, or that two parts share: tests/run/prepare_test.py.
"""

import dataclasses

import jax
import numpy as np
import pytest
import small_bdlm

from bdlm_jax.data.splits import TEST, TRAIN, VALIDATION, Split
from bdlm_jax.domain import negatives
from bdlm_jax.mutual import domain_epoch, lessons, lm_step, sharing
from bdlm_jax.run import build, guards, prepare, reading, stages
from bdlm_jax.run.rows import prompts
from bdlm_jax.types import LeakError
from experiments import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build.start_run(tiny.get_config(), tmp_path_factory.mktemp("leaks"))


@pytest.fixture
def run(made, tmp_path):
    return dataclasses.replace(made, folder=tmp_path)


def build_graph_over(*parts):
    right = build.make_arm
    return lambda run, patch: patch.setattr(build, "make_arm", lambda run, model, **_: right(run, model, parts=parts))


def read_later_edges_once(run, patch):
    right, wrong = Split.edges, iter([(TRAIN, VALIDATION)])
    patch.setattr(Split, "edges", lambda self, *parts: right(self, *next(wrong, parts)))


def believe(part, *parts):
    return lambda run, patch: patch.setitem(prepare.KNOWN, part, parts)


def train_on_a_later_pair(part):
    right = domain_epoch.make_epoch_constants

    def plant(run, patch):
        def constants(*edges, **options):
            user_E, item_E = run.data.split.edges(part)
            made = right(*edges, **options)
            return made | {
                "edge_user_E": np.append(made["edge_user_E"], user_E[0]),
                "edge_item_E": np.append(made["edge_item_E"], item_E[0]),
            }

        patch.setattr(domain_epoch, "make_epoch_constants", constants)

    return plant


def forget_a_seen_item(run, patch):
    right = negatives.make_seen
    patch.setattr(negatives, "make_seen", lambda user, item, *sizes: right(user[:-1], item[:-1], *sizes))
    patch.setattr(guards, "_DRAWN", 1)  # a draw that is too small to show it


def draw_from_all(run, patch):
    def draw(key, seen, user_B, popularity=None):
        return jax.random.randint(key, user_B.shape, 0, seen.n_items)

    patch.setattr(negatives, "sample_negatives", draw)


def read_histories_with(part):
    right = Split.histories
    return lambda run, patch: patch.setattr(Split, "histories", lambda self, *parts: right(self, *parts, part))


def show_what_comes_next(run, patch):
    right, split = prompts.history_prompt, run.data.split

    def prompt(vocabulary, items, options, *, user, **rest):
        next_n = [item for of, item in zip(*split.edges(VALIDATION, TEST)) if of == user and item not in items][:1]
        return right(vocabulary, [*items, *next_n], options, user=user, **rest)

    patch.setattr(prompts, "history_prompt", prompt)


def train_domain(run):
    stages.train_domain(run, "lightgcn")


def train_bdlm(run):
    stages.train_bdlm(run, build.make_decoder(run, None), build.init_tables(run, "lightgcn", small_bdlm.make_arm()))


def graph_at_test(run):
    build.make_arm(run, "lightgcn", parts=build.parts_at_test(run.config))


def read(part):
    return lambda run: reading.ids_reader(run, part)


@pytest.mark.parametrize(
    ("plant", "stage"),
    [
        (read_later_edges_once, train_domain),
        (build_graph_over(TRAIN, TEST), train_domain),
        (build_graph_over(TRAIN, VALIDATION), train_domain),
        (build_graph_over(TRAIN, VALIDATION), train_bdlm),
        (believe("test", TRAIN, VALIDATION, TEST), graph_at_test),
        (train_on_a_later_pair(VALIDATION), train_domain),
        (train_on_a_later_pair(TEST), train_bdlm),
        (read_histories_with(VALIDATION), lambda run: stages.train_domain(run, "sasrec")),
        (forget_a_seen_item, train_domain),
        (draw_from_all, train_domain),
        (read_histories_with(TEST), lambda run: stages.train_text_lm(run, build.make_decoder(run, None))),
        (show_what_comes_next, lambda run: stages.train_ids_lm(run, build.make_decoder(run, None))),
        (show_what_comes_next, train_bdlm),
        (show_what_comes_next, read("test")),
        (believe("validation", TRAIN, VALIDATION), read("validation")),
        (believe("test", TRAIN, VALIDATION, TEST), read("test")),
        (read_histories_with(TEST), read("test")),
        (read_histories_with(TEST), lambda run: stages.text_lm_scorer(run, None, "test")),
    ],
)  # fmt: skip
def test_what_is_held_out_reaches_no_model(run, monkeypatch, plant, stage):
    plant(run, monkeypatch)
    with pytest.raises(LeakError):
        stage(run)
    assert not list(run.folder.rglob("checkpoints"))


def domain_view(params, meeting, arm):
    return dict(zip(("user", "item"), arm.encode(params["shared"], params["domain"])))


def lm_view(params, meeting, arm):
    """Of the LM's own leaves: the rows of ids stand in for its states."""
    rows_XM, rows_IM = sharing.id_rows(params, meeting=meeting, arm=arm)
    z_user, z_item = (sharing.bridge_out(params["lm"]["bridge"], rows) for rows in (rows_XM[: -len(rows_IM)], rows_IM))
    return {"state_user": rows_XM[: -len(rows_IM)], "rows_item": rows_IM, "z_user": z_user, "z_item": z_item}


def teacher_view(params, meeting, arm):
    """Beside that, a teacher at every place, whose decoder and rows are the LM's own."""
    return domain_view(params, meeting, arm) | {"teacher": lessons.make_teacher(params, None, arm=arm, meeting=meeting)}


LM_STEP = small_bdlm.make_lm_step, small_bdlm.whole_batch(), small_bdlm.lm_constants()
EPOCH = (
    small_bdlm.make_domain_epoch, domain_epoch.make_slots(batch_size=16, kl_users=8), small_bdlm.domain_constants(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("module", "losses", "view_of", "taught", "other"),
    [
        (lm_step, "lm_losses", domain_view, LM_STEP, "domain"),
        (lm_step, "lm_losses", teacher_view, LM_STEP, "domain"),
        (domain_epoch, "domain_losses", lm_view, EPOCH, "lm"),
    ],
)
def test_no_gradient_crosses_by_way_of_the_view(monkeypatch, module, losses, view_of, taught, other):
    """A step that makes the view of the params that it differentiates takes the step of one that is given the view."""
    arm, meeting = small_bdlm.make_arm(), small_bdlm.make_meeting(reads="layer0")
    params, optimizer = small_bdlm.make_params(arm, meeting), small_bdlm.make_optimizer()
    make_step, batch, constants = taught
    right = getattr(module, losses)

    def crossing(params, batch, view, constants, **options):
        return right(params, batch, view_of(params, meeting, arm), constants, **options)

    def after():
        step = jax.jit(make_step(arm, meeting, optimizer=optimizer))
        state = small_bdlm.make_state(params, optimizer)
        return step(state, batch, view_of(params, meeting, arm), constants)

    (_, wanted), _ = after(), monkeypatch.setattr(module, losses, crossing)
    state, metrics = after()
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params[other], params[other])))
    if module is lm_step:  # an epoch's later steps see what its first ones moved
        np.testing.assert_allclose(metrics["gradient_norm"], wanted["gradient_norm"], rtol=1e-5)
