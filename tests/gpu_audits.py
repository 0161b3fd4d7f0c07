"""Prints as JSON what XLA compiles for GPUs that are not there: training steps of several shapes, and scoring."""

import dataclasses
import json
import logging

import jax
import numpy as np

from benchmarks.ours import CLASSES, batch_shapes, training_step
from vit_nabirds.audit import program
from vit_nabirds.evaluation.scoring import make_eval_step
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.parallel import devices, gpus
from vit_nabirds.runs.checkpoints import placed

B16 = dict(image_size=224, patch_size=16, hidden_size=768, num_layers=12, num_heads=12, mlp_dim=3072)
TINY = dict(image_size=64, patch_size=16, hidden_size=128, num_layers=3, num_heads=2, mlp_dim=256)
CASES = {
    "ViT-B/16": dict(machines="1x8 h100", shape=B16),
    "ViT-B/16 with remat": dict(machines="8x8 h100", shape=B16, remat="blocks"),
    "ViT-B/16 on A100s": dict(machines="2x4 a100-80", shape=B16),
    "tiny": dict(machines="2x4 a100-40", shape=TINY),
    "tiny, bfloat16 sums": dict(machines="2x4 a100-40", shape=TINY, gradient_dtype="bfloat16"),
    "tiny, float32": dict(machines="4 l40s", shape=TINY, compute_dtype="float32"),
    "tiny, fsdp": dict(machines="2x4 a100-40", shape=TINY, fsdp=4),
    "tiny, fsdp and remat": dict(machines="2x4 a100-40", shape=TINY, fsdp=4, remat="blocks"),
    "tiny, microbatch": dict(machines="2x4 a100-40", shape=TINY, microbatch=16),
    "tiny, one GPU": dict(machines="h200", shape=TINY),
}


def audit(machines: str, shape: dict, fsdp: int = 1, images: int = 64, **fields) -> dict:
    mesh = gpus.mesh_of(gpus.parse(machines), fsdp)
    step, _, state = training_step(shape, mesh, {"compute_dtype": "bfloat16"} | fields)
    compiled = step.lower(state, batch_shapes(shape, images * mesh.size, mesh)).compile(compiler_options=gpus.OPTIONS)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "working MiB": memory.temp_size_in_bytes / 2**20,
        "donated": memory.alias_size_in_bytes,
        "state": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "parameters": sum(leaf.size for leaf in state.params.values()),
        "split": sum(leaf.size for leaf in state.params.values() if not leaf.sharding.is_fully_replicated),
        "collectives": [dataclasses.asdict(c) for c in program.collectives(text)],
        "attentions": program.fused_attentions(text),
        "host": program.host_traffic(text),
    }


def scoring() -> dict:
    mesh = gpus.mesh_of(gpus.parse("8 h100"))
    model = describe(TINY, CLASSES, "bfloat16", device=devices.own(mesh))
    row = jax.ShapeDtypeStruct((64,), np.int32)
    batch = {"image": jax.ShapeDtypeStruct((64, 64, 64, 3), np.uint8), "label": row, "row": row}
    batch = placed(batch | {"mask": jax.ShapeDtypeStruct((64,), np.float32)}, devices.over_batch(mesh))
    totals = {"loss": jax.ShapeDtypeStruct((), np.float32), "top5": jax.ShapeDtypeStruct((), np.int32)}
    totals["confusion"] = jax.ShapeDtypeStruct((CLASSES, CLASSES), np.int32)
    replicated = placed((model.shapes, totals), devices.replicated(mesh))
    step = make_eval_step(model, Normalization(), mesh)
    text = step.lower(*replicated, batch).compile(compiler_options=gpus.OPTIONS).as_text()
    return {
        "attentions": program.fused_attentions(text),
        "collectives": [[c.kind, c.bytes] for c in program.collectives(text)],
    }


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    assert gpus.can_compile()
    gpus.stay_off_devices(1)
    print(json.dumps({name: audit(**case) for name, case in CASES.items()} | {"scoring": scoring()}))
