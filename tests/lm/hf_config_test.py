import dataclasses
import json

import pytest
from golden import make_golden

from bdlm_jax.lm.causal_lm import LMConfig
from bdlm_jax.lm.hf_config import hf_config, lm_config_from_hf
from bdlm_jax.types import InputError

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128009,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
QWEN2_HALF_B = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "sliding_window": 32768, "max_window_layers": 24, "use_sliding_window": False, "tie_word_embeddings": True,
    "vocab_size": 151936, "max_position_embeddings": 32768,
}  # fmt: skip
GEMMA3_1B = {
    "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512, "sliding_window_pattern": 6,
    "vocab_size": 262144, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
}  # fmt: skip


def test_llama_3():
    assert lm_config_from_hf(LLAMA3_8B, remat=True) == LMConfig(
        vocab_size=128256, width=4096, n_layers=32, n_heads=32, n_kv_heads=8, mlp_width=14336, head_width=128,
        rope_theta=5e5, rope_scaling=("llama3", 8.0, 1.0, 4.0, 8192), norm_eps=1e-5, tie_embeddings=False, remat=True,
        max_positions=131072,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (QWEN2_HALF_B, {"window": None, "local_layers": None, "attention_bias": True, "output_bias": False}),
        (GEMMA3_1B, {"window": 512, "rope_theta": 1e6, "local_rope_theta": 1e4}),
        (GEMMA3_1B, {"local_layers": tuple((layer + 1) % 6 != 0 for layer in range(26))}),
        ({"model_type": "gpt2"}, {"vocab_size": 50257, "width": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12}),
        ({"model_type": "gpt2"}, {"mlp_width": 3072, "max_positions": 1024, "norm_eps": 1e-5, "tie_embeddings": True}),
    ],
)
def test_each_family_reads_its_own_names(fields, options):
    assert options.items() <= dataclasses.asdict(lm_config_from_hf(fields)).items()


@pytest.mark.parametrize("case", make_golden.CASES)
def test_a_configuration_written_and_read_is_the_same(case, tmp_path):
    config = lm_config_from_hf(make_golden.CASES[case])
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    assert lm_config_from_hf(tmp_path) == config


def test_our_own_decoder_is_written_as_a_llama():
    ours = LMConfig(vocab_size=40, width=24, n_layers=2, n_heads=6, n_kv_heads=2, mlp_width=32, dtype="bfloat16")
    fields = hf_config(ours)
    assert fields["architectures"] == ["LlamaForCausalLM"]
    read = lm_config_from_hf(fields, dtype="bfloat16")
    assert dataclasses.replace(read, head_width=None, max_positions=None) == ours and read.head_dim == ours.head_dim
    with pytest.raises(InputError, match="family llama has no qk_norm True"):
        hf_config(dataclasses.replace(ours, qk_norm=True))


def test_more_rows_than_the_checkpoint_has():
    assert lm_config_from_hf(QWEN2_HALF_B, vocab_size=152064).vocab_size == 152064
    with pytest.raises(InputError, match="below the 151936 rows"):
        lm_config_from_hf(QWEN2_HALF_B, vocab_size=100)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"auto_map": {"AutoConfig": "code.Config"}}, "model_type None"),
        ({**LLAMA3_8B, "hidden_act": "relu"}, "hidden_act to 'relu'"),
        ({**LLAMA3_8B, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({**LLAMA3_8B, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**LLAMA3_8B, "hidden_size": "wide"}, "no valid configuration of the family llama"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({**GEMMA3_1B, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_cannot_be_computed_is_named(fields, words):
    with pytest.raises(InputError, match=words):
        lm_config_from_hf(fields)


def test_a_folder_without_a_readable_configuration_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        lm_config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        lm_config_from_hf(tmp_path)
