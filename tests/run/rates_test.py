from types import SimpleNamespace

import numpy as np
import pytest

from bdlm_jax.run import rates
from bdlm_jax.run.build import Decoder
from bdlm_jax.runtime.fit import Phase
from experiments import defaults


def made(width, **settings):
    config = defaults.get_config()
    config.update_from_flattened_dict(settings)
    return SimpleNamespace(config=config, lm=SimpleNamespace(width=width))


CHOSEN = {"lm.learning_rate": 0.0, "lm.learning_rate_shared": 0.0, "mutual.learning_rate_bridge": 0.0}


@pytest.mark.parametrize(
    ("trains", "width", "wanted"),
    [("full", 4096, 0.04 / 4096), ("lora", 4096, 0.4 / 4096), ("full", 128, 0.04 / 128), ("lora", 64, 5e-4)],
)
def test_the_decoders_rate_goes_by_what_trains_and_by_the_width(trains, width, wanted):
    run = made(width, **CHOSEN, **{"lm.trains": trains})
    assert rates.decoder_rate(run) == pytest.approx(wanted)
    assert rates.decoder_rate(made(width, **{"lm.learning_rate": 5e-4, "lm.trains": trains})) == 5e-4


@pytest.mark.parametrize(("width", "wanted"), [(4096, 0.4 / 4096), (256, 0.4 / 256), (64, 3e-3)])
def test_adapters_through_which_no_plain_text_goes_may_learn_faster(width, wanted):
    run = made(width, **CHOSEN, **{"lm.trains": "lora", "lm.speaks": "base"})
    assert rates.decoder_rate(run) == pytest.approx(wanted)


@pytest.mark.parametrize("width", [16, 256])
def test_tables_and_bridge_move_by_a_share_of_their_own_size(width):
    run, decoder = made(width, **CHOSEN, **{"lm.trains": "lora"}), Decoder(None, row_std=0.04)
    rate = rates.decoder_rate(run)
    # Of a table whose entries have the deviation .5: the bridge makes .04 of it.
    shared = rates.shared_rate(run, decoder, read_std=0.5, reads="layer0")
    assert shared * rate * 0.04 / 0.5 == pytest.approx(0.03 * 0.04)
    assert rates.shared_rate(run, decoder, read_std=0.5, reads="propagated") == pytest.approx(4 * shared)  # 3 layers
    bridge = rates.bridge_rate(run, decoder, read_std=0.5, given=0.0)
    assert bridge * rate == pytest.approx(0.02 * (0.04 / 0.5) / max(64, width) ** 0.5)


def test_given_rates_are_taken():
    run, decoder = made(64), Decoder(None, row_std=0.1)
    assert rates.bridge_rate(run, decoder, read_std=0.3, given=3e-3) == pytest.approx(1.0)
    assert rates.shared_rate(run, decoder, read_std=0.2, reads="layer0") == pytest.approx(2.0)
    schedule = rates.schedule(run, [Phase("lm", 100, "a"), Phase("lm", 300, "b")])
    assert float(schedule(50)) == pytest.approx(3e-3) and float(schedule(400)) == pytest.approx(3e-4)
    assert np.isclose(rates.lm_rates(schedule, bridge=0.5)["bridge"](50), 1.5e-3)
