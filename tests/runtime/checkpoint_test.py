import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.runtime import checkpoint, files
from bdlm_jax.types import InputError


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array
    key: jax.Array
    cursor: int
    stage: str


def make_state(value=1.0, seed=0):
    params = {
        "shared": {"user": jnp.full((3, 2), value), "item": jnp.arange(8.0).reshape(4, 2) / 3},
        "lm": {"embedding": jnp.array([1.5, -2.25], jnp.bfloat16), "empty": jnp.zeros((0, 2))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(params, optimizer.init(params), jnp.int32(7), jax.random.key(seed), 2**40, "lm")


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        if isinstance(e, jax.Array):
            assert isinstance(a, jax.Array)
            assert a.dtype == e.dtype
            if jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
                a, e = jax.random.key_data(a), jax.random.key_data(e)
            assert np.asarray(a).tobytes() == np.asarray(e).tobytes()
            assert a.shape == e.shape
        else:
            assert type(a) is type(e)
            assert a == e


def test_a_state_comes_back_to_the_bit(tmp_path):
    state = make_state()
    path = checkpoint.save(tmp_path, 7, state)
    restored = checkpoint.restore(path, like=make_state(value=5.0, seed=9)._replace(cursor=0, stage=""))
    assert_same(restored, state)
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)


def test_abstract_and_numpy_templates(tmp_path):
    tree = {"a": np.arange(3, dtype=np.int8), "s": np.float32(0.1), "k": jax.random.key(3, impl="rbg")}
    path = checkpoint.save(tmp_path, 0, tree)
    like = {"a": np.zeros(3, np.int8), "s": np.float32(0), "k": jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))}
    restored = checkpoint.restore(path, like=like)
    assert type(restored["a"]) is np.ndarray
    assert type(restored["s"]) is np.float32
    assert restored["s"] == np.float32(0.1)
    np.testing.assert_array_equal(restored["a"], tree["a"])
    assert jax.random.key_impl(restored["k"]) == jax.random.key_impl(tree["k"])


def test_nothing_but_numbers_needs_no_arrays(tmp_path):
    tree = {"done": True, "rounds": 4, "best": -math.inf, "rate": 0.1}
    path = checkpoint.save(tmp_path, 3, tree)
    assert checkpoint.restore(path, like={"done": False, "rounds": 0, "best": 0.0, "rate": 0.0}) == tree


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"a": np.zeros(2, np.float32)}, "'b' is only in the checkpoint"),
        ({"a": np.zeros(2, np.float32), "b": 1, "c": 1}, "'c' is missing in it"),
        ({"a": np.zeros(3, np.float32), "b": 1}, r"'a' is float32 \(2,\) there and float32 \(3,\) now"),
        ({"a": np.zeros(2, np.float64), "b": 1}, r"'a' is float32 \(2,\) there and float64"),
        ({"a": np.zeros(2, np.float32), "b": 1.0}, "'b' is int there and float now"),
    ],
)
def test_another_structure_is_refused(tmp_path, like, words):
    path = checkpoint.save(tmp_path, 0, {"a": np.ones(2, np.float32), "b": 1})
    with pytest.raises(InputError, match=words):
        checkpoint.restore(path, like=like)


def test_unsavable_leaf_and_missing_checkpoint(tmp_path):
    with pytest.raises(InputError, match="model/f is a function"):
        checkpoint.save(tmp_path, 0, {"model": {"f": lambda: 0}})
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.restore(tmp_path / "00000001", like={})


def test_the_newest_stay_and_the_same_number_is_replaced(tmp_path):
    for step in (2, 10, 9, 100):
        checkpoint.save(tmp_path, step, {"a": step}, keep=3)
    assert checkpoint.steps(tmp_path) == [9, 10, 100]
    checkpoint.save(tmp_path, 100, {"a": -1}, keep=2)
    assert checkpoint.steps(tmp_path) == [10, 100]
    assert checkpoint.restore(checkpoint.latest(tmp_path), like={"a": 0}) == {"a": -1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000100"]


def test_what_a_kill_leaves_is_no_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path, 5, {"a": 5})
    (tmp_path / "00000006.partial").mkdir()
    assert checkpoint.steps(tmp_path) == [5]
    # Killed between the two renames of a replacement.
    path.rename(tmp_path / "00000005.replaced")
    assert checkpoint.restore(checkpoint.latest(tmp_path), like={"a": 0}) == {"a": 5}
    checkpoint.save(tmp_path, 6, {"a": 6})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["00000005", "00000006"]


def test_saving_leaves_no_thread(tmp_path):
    before = set(threading.enumerate())
    checkpoint.save(tmp_path, 0, {"a": jnp.ones(3)})
    assert set(threading.enumerate()) <= before


def test_kill_9_in_the_middle_of_saving(tmp_path):
    program = textwrap.dedent(
        """
        import sys
        import numpy as np
        from bdlm_jax.runtime import checkpoint
        start = checkpoint.latest(sys.argv[1])
        step = 0 if start is None else int(start.name)
        while True:
            step += 1
            # Every third step replaces its own checkpoint, so that a kill meets that path too.
            for _ in range(1 + (step % 3 == 0)):
                checkpoint.save(sys.argv[1], step, {"a": np.full((200, 64), step), "step": step}, keep=2)
            print(step, flush=True)
        """
    )
    newest = 0
    for delay in (0.003, 0.017):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        reported = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        restored = checkpoint.restore(checkpoint.latest(tmp_path), like={"a": np.zeros((200, 64), np.int64), "step": 0})
        assert restored["step"] in (reported, reported + 1)
        assert (restored["a"] == restored["step"]).all()
        assert restored["step"] > newest
        newest = restored["step"]


def test_safetensors_names_and_subtrees(tmp_path):
    tree = {
        "params": {
            "shared": {"user": np.arange(6.0, dtype=np.float32).reshape(2, 3), "scale": np.float32(2.5)},
            "lm": {"embedding": jnp.array([[1.5, -2.25]], jnp.bfloat16)},
        }
    }
    path = tmp_path / "deep" / "model.safetensors"
    files.save_safetensors(path, tree)
    everything = files.load_safetensors(path)
    assert jax.tree.structure(everything) == jax.tree.structure(tree)
    np.testing.assert_array_equal(everything["params"]["shared"]["user"], tree["params"]["shared"]["user"])
    assert everything["params"]["shared"]["scale"].shape == ()
    assert everything["params"]["lm"]["embedding"].dtype == jnp.bfloat16
    assert float(everything["params"]["lm"]["embedding"][0, 1]) == -2.25
    shared = files.load_safetensors(path, prefix="params/shared")
    assert sorted(shared) == ["scale", "user"]
    # A column of a row-major table is not contiguous, and safetensors writes raw memory.
    files.save_safetensors(path, {"t": tree["params"]["shared"]["user"].T})
    np.testing.assert_array_equal(files.load_safetensors(path)["t"], tree["params"]["shared"]["user"].T)


def test_safetensors_errors(tmp_path):
    (tmp_path / "broken").write_bytes(b"no tensors here")
    with pytest.raises(InputError, match="broken cannot be read"):
        files.load_safetensors(tmp_path / "broken")
    with pytest.raises(InputError, match="missing cannot be read"):
        files.load_safetensors(tmp_path / "missing")
    files.save_safetensors(tmp_path / "one", {"a": np.ones(2)})
    with pytest.raises(InputError, match="nothing below 'b'"):
        files.load_safetensors(tmp_path / "one", prefix="b")
    with pytest.raises(InputError, match="slash"):
        files.save_safetensors(tmp_path / "one", {"a/b": np.ones(2)})
