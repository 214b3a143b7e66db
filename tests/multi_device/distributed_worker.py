"""One of the processes of `distributed_test`: python distributed_worker.py COORDINATOR PROCESSES PROCESS FOLDER."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from bdlm_jax.runtime import checkpoint, distributed

sys.path.insert(0, str(Path(__file__).parent))
from toy import assert_close, leaves_named, make, make_batch, make_state, train


def main(coordinator, processes, process, folder):
    distributed.join(coordinator=coordinator, processes=int(processes), process=int(process))
    folder, first = Path(folder), int(process) == 0
    assert (jax.process_count(), jax.device_count()) == (int(processes), 4)
    assert distributed.agree(first, not first) == (True, False)  # the first process' word holds

    compiled = make(data=2, fsdp=2)
    state, losses = train(compiled, compiled.place_state(make_state()), range(2))
    checkpoint.save(folder / "sharded", 1, compiled.fetch_state(state, to_host=False))
    for number in (2, 3):
        state, metrics = compiled.run(state, compiled.place_batch(make_batch(number)))
        losses.append(float(metrics["loss"]))
    again = checkpoint.restore(checkpoint.latest(folder / "sharded"), like=compiled.abstract_state(make_state()))
    again, _ = train(compiled, compiled.place_state(again), (2, 3))
    host = compiled.fetch_state(state)
    assert_close(compiled.fetch_state(again), host)

    with distributed.run_folder(folder / "run") as own:
        assert (Path(own) == folder / "run") is first
        assert (Path(own) / "begun").exists()
        checkpoint.save(Path(own) / "host", 3, host._replace(key=np.zeros(2)))
        (Path(own) / "seen").write_text(process)
    distributed.wait_for_all("checked")
    if first:
        parts = {str(shard.data.shape) for shard in leaves_named(state, "gate_proj/kernel")[0].addressable_shards}
        print(json.dumps({"losses": losses, "item": host.params["shared"]["item"].tolist(), "parts": sorted(parts)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
