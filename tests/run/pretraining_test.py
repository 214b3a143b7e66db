"""A small model from text: what it leaves, that a kill changes no bit of it, and that others read it."""

import dataclasses
import errno
import json
import math
import os

import pytest
from safetensors.numpy import load_file

from bdlm_jax import pretrain as door
from bdlm_jax.evaluation.perplexity import perplexity
from bdlm_jax.lm.hf_config import lm_config_from_hf
from bdlm_jax.lm.hf_weights import check_folder, load_lm
from bdlm_jax.lm.vocabulary import Vocabulary, load_tokenizer
from bdlm_jax.run import pretraining, workdir
from bdlm_jax.run.pretraining import Settings, pretrain
from bdlm_jax.run.rows import text_rows
from bdlm_jax.types import InputError

SMALL = Settings(
    vocab_size=288, width=16, layers=1, heads=2, kv_heads=1, length=32, epochs=2, batch_rows=4, held_out=0.1
)
TEXTS = [f"the {colour} {thing} is {worth}" for colour in ("red", "blue") for thing in ("hat", "scarf", "coat")
         for worth in ("warm", "cheap")]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n".join(TEXTS * 2) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "small"
    return out, pretrain([corpus], out, SMALL)


def test_the_folder_is_a_whole_model_that_speaks_better_than_at_first(made):
    out, facts = made
    assert not out.with_name("small.training").exists()
    shape = lm_config_from_hf(out)
    check_folder(out, shape)
    assert (shape.family, shape.width, shape.max_positions, shape.vocab_size) == ("llama", 16, 32, 288)
    assert facts == json.loads((out / "pretrain.json").read_text())
    assert facts["perplexity"] < 0.95 * 288
    assert facts["parameters"] == sum(value.size for value in load_file(out / "model.safetensors").values())


def test_a_finished_folder_is_told_again_and_another_asked_for_is_refused(made, corpus, tmp_path):
    assert pretrain([corpus], made[0], SMALL) == made[1]
    with pytest.raises(InputError, match=r"exists already with another width \(16, and now it is 32\)"):
        pretrain([corpus], made[0], Settings(**made[1]["settings"] | {"width": 32}))
    (tmp_path / "other.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match="exists already with another the corpus"):
        pretrain([str(tmp_path / "other.txt")], made[0], SMALL)


def test_a_kill_changes_no_bit(made, corpus, tmp_path, monkeypatch):
    fit, left = pretraining.fit, [4]

    class Killed(BaseException):
        pass

    def fit_and_die(*args, arms, **options):
        run = arms["lm"].compiled.run

        def dying(*inputs):
            left[0] -= 1
            if not left[0]:
                raise Killed
            return run(*inputs)

        arm = arms["lm"]._replace(compiled=arms["lm"].compiled._replace(run=dying))
        return fit(*args, arms={"lm": arm}, checkpoint_seconds=0.0, **options)

    monkeypatch.setattr(pretraining, "fit", fit_and_die)
    with pytest.raises(Killed):
        pretrain([corpus], tmp_path / "again", SMALL)
    assert not (tmp_path / "again").exists()
    with pytest.raises(InputError, match=r"again\.training was begun with another seed"):
        pretrain([corpus], tmp_path / "again", Settings(**made[1]["settings"] | {"seed": 1}))
    assert pretrain([corpus], tmp_path / "again", SMALL) == made[1]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made[0] / name).read_bytes()


def test_transformers_says_the_same_of_a_text(made):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out, shape = made[0], lm_config_from_hf(made[0])
    vocabulary = Vocabulary(load_tokenizer(out), 0, 0)
    packed = text_rows([TEXTS[0]], vocabulary, 32)
    ours = perplexity(load_lm(out, shape), shape, packed, batch_rows=1)
    model, tokenizer = (
        kind.from_pretrained(out) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    tokens = tokenizer(f"<bos>{TEXTS[0]}<eos>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert ours == pytest.approx(math.exp(model(tokens, labels=tokens).loss), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--corpus", "no_such.txt"], "no_such.txt cannot be read"),
        (["--width", "15"], "width 15 is no multiple of n_heads 2"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--held_out", "0.7"], "--held_out is 0.7"),
        (["--vocab_size", "10"], "vocab_size 10 cannot hold the bytes"),
        (["--seed", str(2**70)], "it must be at least 0 and below 2**32"),
        (["--out", "/proc/no/model"], "/proc/no/model.training cannot be a run directory"),
    ],
)
def test_what_cannot_be_is_one_sentence(corpus, tmp_path, capsys, words, told):
    start = ["--corpus", corpus, "--out", str(tmp_path / "out"), "--heads", "2", "--kv_heads", "1"]
    assert door.main([*start, *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bdlm_jax: ") and err.count("\n") == 1 and told in err
    assert not (tmp_path / "out").exists()


def test_what_trained_nothing_binds_nothing_and_of_two_at_once_the_second_is_refused(corpus, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot hold the bytes"):
        pretrain([corpus], tmp_path / "out", dataclasses.replace(SMALL, vocab_size=10))
    training = tmp_path / "out.training"
    (training / "tokenizer").mkdir()
    with (
        workdir.hold(training),
        pytest.raises(
            InputError, match=r"another run is at work in .*out\.training; wait for it, or choose another --out"
        ),
    ):
        pretrain([corpus], tmp_path / "out", SMALL)

    def make(*_):
        assert not (training / "tokenizer").exists(), "of other settings"
        return {}

    monkeypatch.setattr(pretraining, "_make", make)
    assert pretrain([corpus], tmp_path / "out", SMALL)["settings"] == dataclasses.asdict(SMALL)


def test_a_full_disk_is_one_sentence(corpus, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "model.safetensors"))

    monkeypatch.setattr(pretraining, "_make", full)
    assert door.main(["--corpus", corpus, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bdlm_jax: ") and err.count("\n") == 1 and "No space left on device" in err
