from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bdlm_jax.lm.config import LMConfig
from bdlm_jax.mutual.options import LMWeights
from bdlm_jax.run import work


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("NVIDIA H200", "2,000 tokens/s, MFU 25.0%"),  # 2 devices that could do 989 TFLOP/s each
        ("TPU v5 lite", "2,000 tokens/s, MFU 125.5%"),  # which is a mistake to be seen, not hidden
        ("cpu", "2,000 tokens/s"),
    ],
)
def test_mfu_is_told_where_the_peak_is_known(monkeypatch, kind, told):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert work.step_rates(989e12 / 4, 1000, 0.5, n_devices=2) == told


def test_item_logits_are_counted_in_the_narrower_of_the_two_widths():
    lm = LMConfig(vocab_size=16, width=8, n_layers=1, n_heads=2, n_kv_heads=1, mlp_width=12)
    shapes = {"tokens": (2, 5), "item_target": (2, 3), "text_target": (2, 4)}
    batch = {name: np.zeros(shape) for name, shape in shapes.items()}

    def count(item_width, **weights):
        how = {"trains": "full", "n_logits": 10, "adapters": 0, "weights": LMWeights(**weights)}
        return work.step_flops(lm, batch, item_width=item_width, **how)["model"]

    logits = 3 * 2 * 3 * 10  # of the forward pass and of both gradients: rows, targets, items
    assert count(4, text=0.0) - count(4, item=0.0, text=0.0) == logits * 2 * 4
    assert count(8, text=0.0) - count(4, text=0.0) == logits * 2 * 4
    assert count(100, text=0.0) == count(8, text=0.0)
