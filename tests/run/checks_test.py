import functools

import pytest

from bdlm_jax import story
from bdlm_jax.data.readers import READERS
from bdlm_jax.domain.models import MODELS
from bdlm_jax.run.checks import RULES, _check_devices, _flatten, check_config
from bdlm_jax.types import InputError
from experiments import defaults

SETTINGS = dict(_flatten(defaults.get_config()))


def refused(**changes):
    """The sentence that refuses the defaults with some settings changed ("lm__width" is lm.width)."""
    config = defaults.get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    with pytest.raises(InputError) as caught:
        check_config(config)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


def test_the_defaults_pass():
    check_config(defaults.get_config())


def test_every_word_and_number_has_a_rule():
    free = {"select", "evaluate.protocols", "dry_run.device", "distributed.coordinator"}  # checked elsewhere, or free
    paths = {
        "data.path",
        "tokenizer.path",
        "lm.path",
        "lm.config",
        "pretrain.corpus",
        "runtime.store",
        "runtime.kept_data",
    }
    ruled = {key for key, value in SETTINGS.items() if not isinstance(value, bool)} - {"data.candidates.cand20"}
    assert ruled - set(RULES) - free - paths == {"data.candidates.cand100"}


@pytest.mark.parametrize("key", sorted(RULES))
def test_every_rule_refuses_something(key):
    wrong = {str: "nothing(", tuple: ("twice", "twice"), int: -2, float: -2.0}[type(SETTINGS[key])]
    assert f"config.{key} is {wrong!r}; it must be " in refused(**{key.replace(".", "__"): wrong})


@pytest.mark.parametrize(("key", "value"), [("lm.widht", 32), ("lm.width", "wide"), ("mutual.domain.kll", 0.0)])
def test_a_misspelt_key_and_a_wrong_type_are_refused_where_they_are_written(key, value):
    section, _, name = key.rpartition(".")
    with pytest.raises((AttributeError, TypeError), match=r'Did you mean "(width|kl)"|field .width.'):
        setattr(functools.reduce(getattr, section.split("."), defaults.get_config()), name, value)


@pytest.mark.parametrize("key", ["lm.width", "lm.remat", "distributed.coordinator", "select", "distributed"])
def test_a_config_without_a_setting_is_refused(key, tmp_path):
    config, (*sections, name) = defaults.get_config(), key.split(".")
    with config.unlocked():
        del functools.reduce(getattr, sections, config)[name]
    for refuse in (check_config, lambda config: story.train_together(config, str(tmp_path / "run"))):
        with pytest.raises(InputError, match=rf"config\.{key}\S* is missing; begin with"):
            refuse(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parallel": "gpu"}, "one of jit, pmap, mesh"),
        ({"models": ("lightgnc",)}, "config.models is"),
        ({"models": ("mf", "mf")}, "different words"),
        ({"lm__width": True}, "config.lm.width is True; it must be a number of at least 2"),
        ({"lm__width": 63}, "config.lm: width 63 is no multiple of n_heads 2"),
        ({"lm__width": 66, "lm__n_heads": 2}, "config.lm: the head width 33 is odd"),
        ({"lm__attention": "cudnn"}, 'config.lm: attention "cudnn" needs dtype "bfloat16"'),
        ({"lm__n_heads": 4, "lm__n_kv_heads": 3}, "config.lm: n_heads 4 is no multiple of n_kv_heads 3"),
        ({"prompts__length": 19}, "use a length of at least 20"),  # 16 title tokens + 4
        ({"prompts__length": 35, "data__user_fields": ("age",)}, "use a length of at least 36"),  # 2 · 16 + 4
        (
            {"domain__model": "sasrec", "shared__width": 63},
            "sasrec's width 63 is no multiple of its 2 heads",
        ),
        ({"models": ("sasrec",), "shared__width": 63}, "sasrec's width 63 is no multiple of its 2 heads"),
        ({"domain__options__n_layer": 5}, "n_layer is no option of the domain model lightgcn"),
        ({"mutual__lm_epochs": 0.0, "mutual__rounds": 0, "models": ("bdlm",)}, "config.models holds bdlm, but no LM"),
        ({"mutual__lm_epochs": 0.0, "mutual__rounds": 0, "models": ("ids_lm",)}, "config.models holds ids_lm, but no"),
        ({"mutual__lm__item": 0.0}, "would never learn to recommend"),
        (
            {"mutual__taught__rounds": 1, "mutual__taught__lm": "afresh", "mutual__teacher": "pool"},
            "it has nothing to say beside the LM; set mutual.text_head",
        ),
        (
            {"mutual__taught__rounds": 1, "mutual__taught__lm_epochs": 0.0, "mutual__taught__domain_epochs": 0},
            "config.mutual.taught.rounds is set, but a lesson has no epoch",
        ),
        ({"lm__accumulate": 2, "mutual__align": "infonce"}, "infonce, which compares a whole batch"),
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
        (
            {"data__kind": "table", "data__path": ".", "data__options__duplicates": "keep"},
            "full ranks only what is new",
        ),
        ({"data__split": "ratio", "data__test": 0.95}, "below 1 together"),
        ({"data__split": "global_time", "data__validation": 0.0}, "above 0"),
        ({"data__split": "cold_items"}, "data of the kind twins are split already"),
        ({"data__cold_share": 1.0}, "below 1"),
        ({"tokenizer__path": "no_such_tokenizer"}, "config.tokenizer.path: no_such_tokenizer is not there"),
        ({"pretrain__corpus": "no_such_corpus"}, "config.pretrain.corpus: no_such_corpus is not there"),
        ({"pretrain__corpus": "."}, "config.pretrain.corpus: . is no file"),
        ({"mf__learning_rate": float("nan")}, "a number above 0"),
        ({"lm__weight_decay": float("nan")}, "a number of at least 0"),
        ({"lm__dropout": 1.0}, "below 1"),
        ({"prompts__user_dropout": 1.5}, "at most 1"),
        ({"lm__trains": "lora", "lm__lora_targets": "nothing"}, "'nothing' matches no leaf of the decoder"),
        ({"lm__speaks": "base"}, "config.lm.speaks base takes adapters off, and lm.trains full has none"),
        ({"lm__speaks": "base", "lm__trains": "bridge"}, "and lm.trains bridge has none; set lm.trains to lora"),
        (
            {"lm__speaks": "base", "lm__trains": "lora", "pretrain__corpus": "text.txt"},
            "config.lm.speaks base leaves plain text to the model as it came, so pretrain.corpus has nothing to train",
        ),
        (
            {"lm__speaks": "base", "lm__trains": "lora", "lm__lora_targets": ".*_proj/kernel|embedding"},
            "config.lm.lora_targets matches embedding, and lm.speaks base exports adapters of the layers alone",
        ),
        ({"data__min_user": 3}, "config.data.min_user is 3, but data of the kind twins come as they are"),
        ({"seed": 2**40}, "below 2**32"),
        ({"seed": 2**70}, "below 2**32"),
        ({"domain__epochs": 2**40}, "it must be below 1,000,000"),
        ({"lm__n_layers": 10**9}, "config.lm.n_layers is 1000000000; it must be below 1,000"),
        ({"mutual__rounds": 10**9}, "it must be below 1,000,000"),
        ({"lm__batch_rows": 2**31}, "it must be below 2,147,483,648"),
        ({"lm__clip_norm": float("inf")}, "a number of at least 0"),
        ({"pretrain__epochs": float("inf")}, "epochs is inf; it must be a number of at least 0, and finite"),
        ({"mutual__lm_epochs": float("inf")}, "config.mutual.lm_epochs is inf"),
        ({"lm__weight_decay": float("inf")}, "config.lm.weight_decay is inf"),
        ({"data__options__n_users": 2**40}, "a whole number of at most 1,000,000"),
        ({"data__options__follow": "much"}, "a number of at most"),
        ({"lm__remat": None}, "config.lm.remat is None"),
        ({"domain__popularity": 1e300}, "config.domain.popularity is 1e+300; it must be a number of at least 0 and at"),
        ({"runtime__store": "a\0b"}, "config.runtime.store is 'a\\x00b', which holds a null byte"),
    ],
)
def test_impossible_settings_are_refused(changes, told):
    assert told in refused(**changes)


@pytest.mark.parametrize("key", ["models", "domain.model"])
@pytest.mark.parametrize("model", MODELS)
def test_every_domain_model_may_stand_in_models_and_in_the_bridge(key, model):
    config = defaults.get_config()
    config.update_from_flattened_dict({key: (model, "bdlm") if key == "models" else model})
    check_config(config)


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_may_be_chosen(kind):
    config = defaults.get_config()
    config.data.kind, config.data.path, config.models = kind, ".", ("item_pop",)
    check_config(config)


def test_batches_must_divide_over_the_devices():
    config = defaults.get_config()
    config.parallel = "pmap"
    _check_devices(config, n_devices=8)  # 16 rows, 4096 triples, 256 users
    with pytest.raises(InputError, match=r"lm\.batch_rows 16 does not divide over 3 devices .*; use 15\."):
        _check_devices(config, n_devices=3)
    config.parallel = "jit"
    _check_devices(config, n_devices=3)


def test_stages_are_shared_by_runs_of_one_process(monkeypatch):
    config = defaults.get_config()
    config.runtime.store = "stages"
    _check_devices(config, n_devices=1)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(InputError, match="store is for one process"):
        _check_devices(config, n_devices=1)


def test_text_lm_needs_cand20():
    config = defaults.get_config()
    config.select, config.evaluate.protocols, config.evaluate.text_protocols = "hr@1/full", ("full",), ()
    config.data.candidates = {"cand100": 99}
    with pytest.raises(InputError, match="add cand20 to"):
        check_config(config)
    config.models = ("bdlm",)
    check_config(config)
