"""What the compiled training step communicates and holds, on devices that need not be there.

It is compiled for N simulated devices, and the collectives are read from the compiled program. That needs no
accelerator and says nothing about time: what limits a machine follows from its links and these bytes.
"""

import json
import os
import re
import subprocess
import sys

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "s8": 1}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def collectives(program: str) -> list[tuple[str, int]]:
    """Kind and bytes (of its results, on one device) of each collective in a compiled program's text."""
    found = []
    for types, kind in re.findall(rf" = (.+?) ({COLLECTIVES})(?:-start)?\(", program):
        size = 0
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
            count = 1
            for side in filter(None, shape.split(",")):
                count *= int(side)
            size += BYTES[dtype] * count
        found.append((kind, size))
    return found


def audit(devices: int, shape: dict, per_device: int) -> dict:
    """Of the training step for `devices` devices of `per_device` images; run where XLA_FLAGS says so many devices."""
    import jax

    from benchmarks.ours import batch_shapes, training_step
    from vit_nabirds.parallel import devices as devices_lib
    from vit_nabirds.runs.checkpoints import placed

    mesh = devices_lib.make_mesh()
    assert mesh.size == devices
    step, first_state = training_step(shape, mesh)
    like = placed(jax.eval_shape(first_state), devices_lib.replicated(mesh))
    compiled = step.lower(like, batch_shapes(shape, devices * per_device, mesh)).compile()
    found, memory = collectives(compiled.as_text()), compiled.memory_analysis()
    reduced = sum(size for kind, size in found if kind == "all-reduce")
    parameters = sum(4 * x.size for x in like.params.values())
    return {
        "devices": devices,
        "collectives": {kind: sum(k == kind for k, _ in found) for kind, _ in found},
        "all-reduced MB": reduced / 1e6,
        "gradients MB": parameters / 1e6,
        "other %": 100 * (sum(size for _, size in found) - parameters * (devices > 1)) / parameters,
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
