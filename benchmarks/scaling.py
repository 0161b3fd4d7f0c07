"""What the compiled training step communicates and holds, on devices that need not be there.

It is compiled for N simulated devices, and the collectives are read from the compiled program. That needs no
accelerator and says nothing about time: what limits a machine follows from its links and these bytes.
"""

import collections
import json
import os
import subprocess
import sys


def audit(devices: int, shape: dict, per_device: int) -> dict:
    """Of the training step for `devices` devices of `per_device` images; run where XLA_FLAGS says so many devices."""

    from benchmarks.ours import batch_shapes, training_step
    from vit_nabirds.audit import program
    from vit_nabirds.parallel import devices as devices_lib

    mesh = devices_lib.make_mesh()
    assert mesh.size == devices
    step, _, like = training_step(shape, mesh)
    compiled = step.lower(like, batch_shapes(shape, devices * per_device, mesh)).compile()
    found, memory = program.collectives(compiled.as_text()), compiled.memory_analysis()
    reduced = sum(c.bytes for c in found if c.kind == "all-reduce")
    parameters = sum(4 * x.size for x in like.params.values())
    return {
        "devices": devices,
        "collectives": dict(collections.Counter(c.kind for c in found)),
        "all-reduced MB": reduced / 1e6,
        "gradients MB": parameters / 1e6,
        "other %": 100 * (sum(c.bytes for c in found) - parameters * (devices > 1)) / parameters,
        "state GB": memory.argument_size_in_bytes / 1e9,
        "working memory GB": memory.temp_size_in_bytes / 1e9,
    }


def run(counts: list[int], shape: dict, per_device: int) -> list[dict]:
    rows = []
    for devices in counts:
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "benchmarks.scaling", json.dumps([devices, shape, per_device])]
        done = subprocess.run(command, env=os.environ | flags, text=True, stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


if __name__ == "__main__":
    print(json.dumps(audit(*json.loads(sys.argv[1]))))
