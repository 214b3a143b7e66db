from types import SimpleNamespace

import jax
import pytest

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
