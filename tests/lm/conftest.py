import pytest


@pytest.fixture(scope="module", autouse=True)
def _looped_layers():
    # A loop compiles one layer, in half the time; that unrolling changes nothing is proven in causal_lm_test.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bdlm_jax.lm.decoder._UNROLLED_LAYERS", 0)
        yield
