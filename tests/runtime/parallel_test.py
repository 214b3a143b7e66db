import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bdlm_jax.runtime.parallel import compile_step, enable_compilation_cache
from bdlm_jax.types import InputError


def make_state():
    table = jnp.ones((64, 64))
    return {"table": table, "copy": table, "key": jax.random.key(0), "step": 0}


def add_step(state, batch, *, axis_name=None):
    key, _ = jax.random.split(state["key"])
    table = state["table"] + batch.sum()
    return {"table": table, "copy": table, "key": key, "step": state["step"] + 1}, {"sum": batch.sum()}


@pytest.mark.parametrize("parallel", ["jit", "pmap", "mesh"])
def test_donation_eats_neither_the_callers_arrays_nor_what_was_fetched(parallel):
    state, traces = make_state(), []

    def counting_step(state, batch, *, axis_name=None):
        traces.append(axis_name)
        return add_step(state, batch)

    compiled = compile_step(counting_step, parallel=parallel, n_devices=1)
    placed = compiled.place_state(state)
    fetched = compiled.fetch_state(placed)
    for _ in range(2):
        placed, metrics = compiled.run(placed, np.ones(4, np.float32))
    assert len(traces) == 1
    assert float(metrics["sum"]) == 4 and metrics["sum"].shape == ()
    assert (np.asarray(state["table"]) == 1).all() and (fetched["table"] == 1).all()
    assert (jax.random.key_data(state["key"]) == jax.random.key_data(fetched["key"])).all()
    after = compiled.fetch_state(placed)
    assert (after["table"] == 1 + 4 + 4).all() and after["step"] == 2
    assert isinstance(after["table"], np.ndarray)
    assert jnp.issubdtype(after["key"].dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("parallel", ["jit", "mesh"])
def test_donated_memory_is_used_up(parallel):
    compiled = compile_step(add_step, parallel=parallel, n_devices=1)
    placed = compiled.place_state(make_state())
    compiled.run(placed, np.ones(4, np.float32))
    assert placed["table"].is_deleted()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel": "xmap"}, "use 'jit', 'pmap' or 'mesh'"),
        ({"parallel": "jit", "n_devices": 2}, "1 to 1"),
        ({"parallel": "pmap", "n_devices": 10**6}, "devices were asked for"),
        ({"parallel": "mesh", "n_devices": -1}, "devices were asked for"),
        ({"parallel": "mesh", "mesh": {"fsdp": 1000}}, "fsdp 1000 x tensor 1, which needs 1000 devices, but there are"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        compile_step(add_step, **options)


@pytest.mark.parametrize("from_environment", [False, True])
def test_compiled_programs_are_kept_where_asked(tmp_path, monkeypatch, from_environment):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if from_environment:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        enable_compilation_cache(tmp_path / "compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.jit(lambda x: jnp.cos(x) * 3 - x)(jnp.ones(7)).block_until_ready()
        assert bool(list(tmp_path.rglob("*cache"))) is not from_environment
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
