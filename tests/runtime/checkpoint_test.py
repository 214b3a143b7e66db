import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bdlm_jax.runtime import checkpoint
from bdlm_jax.types import InputError, TrainState


def make_tree(value=1.0, seed=0, cursor=2**40, stage="lm"):
    params = {
        "shared": {"user": jnp.full((3, 2), value), "item": jnp.arange(8.0).reshape(4, 2) / 3},
        "lm": {"embedding": jnp.array([1.5, -2.25], jnp.bfloat16), "empty": jnp.zeros((0, 2))},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = TrainState(params, optimizer.init(params), jnp.int32(7), jax.random.key(seed))
    plain = {"cursor": cursor, "stage": stage, "done": bool(seed), "best": -math.inf * value, "rate": 0.1}
    return {"state": state, "plain": plain, "host": np.full(3, value, np.int8), "scalar": np.float32(value / 3)}


def bits(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) if hasattr(leaf, "dtype") else leaf


def test_every_kind_of_leaf_comes_back_as_what_it_was(tmp_path):
    tree = make_tree()
    path = checkpoint.save(tmp_path, 7, tree)
    restored = checkpoint.restore(path, like=make_tree(value=5.0, seed=9, cursor=0, stage=""))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for mine, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(tree)):
        assert type(mine) is type(wanted)
        assert bits(mine) == bits(wanted)
    assert jax.random.uniform(restored["state"].key) == jax.random.uniform(tree["state"].key)


def test_a_shape_is_enough_to_restore_into(tmp_path):
    tree = {"a": np.arange(3, dtype=np.int8), "k": jax.random.key(3, impl="rbg")}
    path = checkpoint.save(tmp_path, 0, tree)
    like = jax.eval_shape(lambda: {"a": jnp.zeros(3, jnp.int8), "k": jax.random.key(0, impl="rbg")})
    restored = checkpoint.restore(path, like=like)
    assert isinstance(restored["a"], jax.Array)
    np.testing.assert_array_equal(restored["a"], tree["a"])
    assert bits(restored["k"]) == bits(tree["k"])


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
    assert checkpoint.latest(tmp_path) is checkpoint.latest(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.restore(tmp_path / "1", like={})


def test_the_newest_stay_and_what_a_kill_leaves_is_no_checkpoint(tmp_path):
    threads = set(threading.enumerate())
    for step in (2, 9, 10, 100):
        checkpoint.save(tmp_path, step, {"a": step, "b": jnp.ones(3)}, keep=3)
    assert set(threading.enumerate()) <= threads
    assert checkpoint.steps(tmp_path) == [9, 10, 100]
    shutil.copytree(tmp_path / "100", tmp_path / "101.orbax-checkpoint-tmp")  # killed before the rename
    shutil.rmtree(tmp_path / "9" / "default")  # killed while the oldest was taken away
    assert checkpoint.restore(checkpoint.latest(tmp_path), like={"a": 0, "b": jnp.zeros(3)})["a"] == 100
    checkpoint.save(tmp_path, 101, {"a": 101}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "101"]


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
            checkpoint.save(sys.argv[1], step, {"a": np.full((200, 64), step), "step": step}, keep=2)
            print(step, flush=True)
        """
    )
    newest = 0
    for delay in (0.003, 0.017):
        command = [sys.executable, "-c", program, str(tmp_path)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            reported = int(process.stdout.readline())
            time.sleep(delay)
            process.kill()
            reported = max([reported, *map(int, process.stdout.read().split())])
        restored = checkpoint.restore(checkpoint.latest(tmp_path), like={"a": np.zeros((200, 64), np.int64), "step": 0})
        assert restored["step"] in (reported, reported + 1)
        assert (restored["a"] == restored["step"]).all()
        assert restored["step"] > newest
        newest = restored["step"]


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_with_what_to_delete(tmp_path, how):
    tree = {"a": np.arange(300.0)}
    at = checkpoint.save(tmp_path / "checkpoints", 3, tree)
    for path in sorted(path for path in at.rglob("*") if path.is_file() and path.stat().st_size):
        whole = path.read_bytes()
        if path.name == "SHA256SUMS":
            continue
        path.unlink() if how == "gone" else path.write_bytes(
            whole[:-1] + (bytes([whole[-1] ^ 1]) if how == "flip" else b"")
        )
        with pytest.raises(InputError, match=f"{path} is damaged.* Delete {tmp_path}, and the same command trains"):
            checkpoint.restore(at, like=tree)
        path.write_bytes(whole)
    np.testing.assert_array_equal(checkpoint.restore(at, like=tree)["a"], tree["a"])
