"""Adapters apart from their model: what PEFT makes of the two is our merged tree, and without them it is the base."""

import json

import jax
import numpy as np
import pytest
from golden import make_golden
from safetensors.numpy import load_file, save_file

from bdlm_jax.lm import lora
from bdlm_jax.lm.causal_lm import lm_hidden
from bdlm_jax.lm.hf_adapters import write_adapters
from bdlm_jax.lm.hf_config import lm_config_from_hf
from bdlm_jax.lm.hf_folder import write_hf_folder
from bdlm_jax.lm.hf_weights import export_tensors, load_lm
from bdlm_jax.lm.vocabulary import Vocabulary, train_tokenizer

FAMILIES = ("llama", "gpt2", "gemma2")  # plain; one weight for q, k and v; an embedding that is scaled
TARGETS = {"all": "layers/.*_proj/kernel", "few": "layers/.*/(q|v|down)_proj/kernel"}
STEM = "base_model.model."


def adapted_lm(family, targets, n_text=None):
    """The stored model of a family with adapters as training leaves them."""
    config = lm_config_from_hf(make_golden.HERE / family, vocab_size=n_text)
    params = load_lm(make_golden.HERE / family, config)
    adapters = lora.init_lora(jax.random.key(1), params, rank=3, targets=targets, alpha=1.5)
    draw = np.random.default_rng(2)
    adapters = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(x.dtype) if x.ndim else x, adapters)
    return {**params, lora.LORA: adapters}, config


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_by_pefts_rule_the_files_give_the_merged_tree(family, targets, tmp_path):
    lm, config = adapted_lm(family, targets)
    write_adapters(tmp_path / "adapters", lm, config)
    told = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    pairs, weights = load_file(tmp_path / "adapters" / "adapter_model.safetensors"), {}
    seen = set()
    for name, weight in export_tensors(lora.without(lm), config):
        stem = STEM + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in pairs:
            (module,) = [each for each in told["target_modules"] if stem.endswith(f".{each}")]
            a, b = pairs.pop(f"{stem}.lora_A.weight"), pairs.pop(f"{stem}.lora_B.weight")
            assert len(a) == b.shape[1] == told["rank_pattern"].get(module, told["r"])
            delta = told["alpha_pattern"].get(module, told["lora_alpha"]) / len(a) * b @ a
            weight = weight + (delta.T if told["fan_in_fan_out"] else delta)
            seen.add(module)
        weights[name] = np.ascontiguousarray(weight)
    assert not pairs and seen == {*told["target_modules"]}
    if targets == TARGETS["all"]:
        assert len(seen) == (4 if family == "gpt2" else 7)
    save_file(weights, tmp_path / "model.safetensors")
    again, merged = load_lm(tmp_path, config), lora.merge(lm)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5), again, merged)
    assert not np.allclose(merged["layers"]["mlp"]["down_proj"]["kernel"], lm["layers"]["mlp"]["down_proj"]["kernel"])


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_ranks_as_we_do_and_without_adapters_the_base_writes(family, tmp_path):
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    vocabulary = Vocabulary(train_tokenizer([], 261), n_users=5, n_items=7)
    lm, config = adapted_lm(family, TARGETS["few"], n_text=vocabulary.n_text)
    size = float(np.std(lm["embedding"])) * (config.width**0.5 if config.scale_embedding else 1)
    rows_XM = size * np.random.default_rng(3).normal(size=(vocabulary.n_rows, config.width))
    write_hf_folder(tmp_path, lora.without(lm), config, vocabulary, rows_XM)
    write_adapters(tmp_path / "recommends", lm, config)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_BL = torch.tensor([[1, 3, *(vocabulary.item_token(item) for item in (2, 0, 5))], [1, 70, 71, 72, 73]])
    writing = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens_BL)}
    wrote_BL, base_BLV = base.generate(tokens_BL, **writing), base(tokens_BL).logits
    model = peft.PeftModel.from_pretrained(base, tmp_path / "recommends")
    with torch.no_grad():
        theirs_BLV = model(tokens_BL).logits.numpy()
    places = np.broadcast_to(np.arange(5), (2, 5))
    hidden_BLM = lm_hidden(lm, config, tokens_BL.numpy(), places, np.ones((2, 5), int), rows_XM)
    ours_BLX = np.asarray(hidden_BLM @ rows_XM.T)
    np.testing.assert_array_equal(np.argsort(theirs_BLV[..., vocabulary.n_text :]), np.argsort(ours_BLX))
    if config.logit_softcap is not None:
        ours_BLX = config.logit_softcap * np.tanh(ours_BLX / config.logit_softcap)
    np.testing.assert_allclose(theirs_BLV[..., vocabulary.n_text :], ours_BLX, rtol=1e-4, atol=1e-4)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(tokens_BL).logits, base_BLV)
        assert model.generate(tokens_BL, **writing).tolist() == wrote_BL.tolist()
    assert model.generate(tokens_BL, **writing).tolist() != wrote_BL.tolist(), "adapters left on are heard"
