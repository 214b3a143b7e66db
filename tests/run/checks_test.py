import functools

import pytest

from bdlm_jax.run.checks import RULES, _check_devices, check_config
from bdlm_jax.types import InputError
from experiments import defaults


def refused(**changes):
    """The sentence that refuses the defaults with some settings changed ("lm__width" is lm.width)."""
    config = defaults.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    with pytest.raises(InputError) as caught:
        check_config(config)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


def test_the_defaults_pass():
    check_config(defaults.get_config())


@pytest.mark.parametrize("key", sorted(set(RULES) - {"name"}))
def test_every_rule_refuses_something(key):
    config = defaults.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: object})
    with pytest.raises(InputError, match=rf"config\.{key} is .*; it must be"):
        check_config(config)


@pytest.mark.parametrize(("key", "value"), [("lm.widht", 32), ("lm.width", "wide"), ("mutual.domain.kll", 0.0)])
def test_a_misspelt_key_and_a_wrong_type_are_refused_where_they_are_written(key, value):
    section, _, name = key.rpartition(".")
    with pytest.raises((AttributeError, TypeError), match=r'Did you mean "(width|kl)"|field .width.'):
        setattr(functools.reduce(getattr, section.split("."), defaults.get_config()), name, value)


def test_a_config_without_a_setting_is_refused():
    config = defaults.get_config()
    with config.unlocked():
        del config.lm.width
    with pytest.raises(InputError, match=r"config\.lm\.width is missing"):
        check_config(config)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parallel": "gpu"}, "one of jit, pmap, mesh"),
        ({"models": ("lightgnc",)}, "config.models is"),
        ({"models": ("mf", "mf")}, "different words"),
        ({"lm__width": True}, "a whole number"),
        ({"lm__width": 63}, "config.lm.width 63 is no multiple of lm.n_heads 2"),
        ({"lm__width": 66, "lm__n_heads": 2}, "is 33; rotary positions need it even"),
        ({"lm__attention": "cudnn"}, "cudnn\" computes in lm.dtype bfloat16 alone"),
        ({"lm__n_heads": 4, "lm__n_kv_heads": 3}, "lm.n_heads 4 is no multiple of lm.n_kv_heads 3"),
        ({"prompts__length": 19}, "use a length of at least 20"),  # 16 title tokens + 4
        ({"prompts__length": 35, "data__user_fields": ("age",)}, "use a length of at least 36"),  # 2 · 16 + 4
        ({"domain__model": "mf"}, "config.models holds mf and domain.model is mf too"),
        ({"domain__model": "sasrec", "shared__width": 63}, "must be even"),
        ({"mutual__lm_epochs": 0.0, "mutual__rounds": 0}, "config.models holds bdlm, but no LM epoch"),
        (
            {"mutual__lm_epochs": 0.0, "mutual__rounds": 0, "models": ("ids_lm",)},
            "config.models holds ids_lm, but",
        ),
        ({"mutual__lm__item": 0.0}, "would never learn to recommend"),
        ({"evaluate__protocols": ("cand20", "cand50")}, "config.evaluate.protocols holds 'cand50'"),
        ({"evaluate__text_protocols": ("full",)}, "text_lm scores given candidates only"),
        ({"select": "ndcg@10/cand50"}, "one of cand100, cand20, full"),
        ({"select": "recall@10/cand100"}, "hr@1 or ndcg@10"),
        ({"data__candidates__full": 99}, "config.data.candidates.full is a reserved"),
        ({"data__candidates__pair": 1}, "config.data.candidates.pair is a reserved"),
        ({"data__candidates__cand0": 0}, "at least 1"),
        ({"data__options__n_user": 5}, "n_user is no option of the data kind twins; did you mean n_users?"),
        ({"data__kind": "movielens"}, "config.data.path is empty"),
        ({"data__path": "x.csv"}, "the data kind twins is generated"),
        ({"data__kind": "table", "data__path": "no_such_file.csv"}, "no_such_file.csv is not there"),
        ({"data__kind": "adjacency", "data__path": "."}, "no validation part"),
        ({"data__split": "ratio", "data__test": 0.95}, "below 1 together"),
        ({"data__split": "global_time", "data__validation": 0.0}, "above 0"),
        ({"tokenizer__path": "no_such_tokenizer"}, "config.tokenizer.path: no_such_tokenizer is not there"),
        ({"pretrain__corpus": "no_such_corpus"}, "config.pretrain.corpus: no_such_corpus is not there"),
        ({"lm__learning_rate": float("nan")}, "a number above 0"),
        ({"lm__dropout": 1.0}, "below 1"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(changes, told):
    assert told in refused(**changes)


def test_batches_must_divide_over_the_devices():
    config = defaults.get_config()
    config.parallel = "pmap"
    _check_devices(config, n_devices=8)  # 16 rows, 4096 triples, 256 users
    with pytest.raises(InputError, match=r"lm\.batch_rows 16 does not divide over 3 devices .*; use 15\."):
        _check_devices(config, n_devices=3)
    config.parallel = "jit"
    _check_devices(config, n_devices=3)


def test_text_lm_needs_cand20():
    config = defaults.get_config()
    config.select, config.evaluate.protocols, config.evaluate.text_protocols = "hr@1/full", ("full",), ()
    del config.data.candidates["cand20"]
    with pytest.raises(InputError, match="add cand20 to"):
        check_config(config)
    config.models = ("bdlm",)
    check_config(config)


def test_the_corpus_must_be_a_file(tmp_path):
    assert "is no file" in refused(pretrain__corpus=str(tmp_path))
