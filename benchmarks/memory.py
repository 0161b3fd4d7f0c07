"""What a GPU holds in a training step of large models, by XLA's account, on a machine that has none:

    python -m benchmarks.memory FILE [--only=TEXT]

64 photographs a GPU, bfloat16, AdamW, eight H100s of one node. A compilation takes one to ten minutes on two cores.
Each adds a line to FILE, and what is there is not compiled again. `make gpu-compile` installs the compiler.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax

from benchmarks.ours import batch_shapes, training_step
from vit_nabirds.audit.estimate import CUDA, NCCL
from vit_nabirds.parallel import gpus
from vit_nabirds.training.microbatch import Memory

IMAGES = 64  # on each GPU
DINOV2 = dict(patch_size=14, layer_norm_eps=1e-6, layer_scale=True, gated=True, pool="cls+mean")
MODELS = {
    "ViT-B/16": dict(patch_size=16, hidden_size=768, num_layers=12, num_heads=12, mlp_dim=3072),
    "ViT-L/16": dict(patch_size=16, hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096),
    "ViT-H/14": dict(patch_size=14, hidden_size=1280, num_layers=32, num_heads=16, mlp_dim=5120),
    "DINOv2-g/14": DINOV2 | dict(hidden_size=1536, num_layers=40, num_heads=24, mlp_dim=4096),
}


def cases() -> list[str]:
    """Like 'ViT-L/16, 448 px, fsdp 8, remat'; the smaller image size and the fewer GPUs come first."""
    layouts = itertools.product((224, 448), (1, 8, 2, 4), ("", ", remat"), MODELS)
    return [f"{model}, {size} px, fsdp {fsdp}{remat}" for size, fsdp, remat, model in layouts]


def measure(case: str) -> dict[str, int]:
    """Bytes of a GPU: state and batch, working memory, and all that is allocated at once."""
    name, size, fsdp, *remat = case.split(", ")
    shape = MODELS[name] | {"image_size": int(size.split()[0])}
    mesh = gpus.mesh_of(gpus.parse("8 h100"), int(fsdp.split()[1]))
    step, _, state = training_step(shape, mesh, {"compute_dtype": "bfloat16", "remat": "blocks" if remat else "none"})
    compiled = step.lower(state, batch_shapes(shape, IMAGES * mesh.size, mesh)).compile(compiler_options=gpus.OPTIONS)
    memory = Memory.of(compiled)
    jax.clear_caches()
    return {"arguments": memory.arguments, "working": memory.working, "total": memory.total}


def table(found: dict[str, dict[str, int]]) -> str:
    """Markdown: a row for each model and size, GiB by layout; in bold what fits 40 GB, in brackets what no GPU of 80 GB
    holds."""
    layouts = sorted({case.split(", ", 2)[2] for case in cases()})
    lines = ["| | " + " | ".join(layouts) + " |", "|---|" + "---:|" * len(layouts)]
    for row in dict.fromkeys(", ".join(case.split(", ")[:2]) for case in cases()):
        cells = [shown(found.get(f"{row}, {layout}")) for layout in layouts]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(memory: dict[str, int] | None) -> str:
    if memory is None:
        return "–"
    used = memory["total"] + CUDA + NCCL
    text = f"{memory['total'] / gpus.GIB:.1f}"
    return (
        f"**{text}**"
        if used <= gpus.GPUS["a100-40"].memory
        else f"({text})" * (used > gpus.GPUS["h100"].memory) or text
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a line of JSON for each case that is done")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this text, like 'ViT-L/16, 224 px'")
    options = parser.parse_args()
    if not gpus.can_compile():
        parser.error("the compiler for GPUs is not here: run `make gpu-compile`")
    gpus.stay_off_devices(1)
    lines = options.file.read_text().splitlines() if options.file.exists() else []
    found = {line["case"]: line for line in map(json.loads, lines)}
    for case in [case for case in cases() if options.only in case and case not in found]:
        found[case] = {"case": case, **measure(case)}
        with options.file.open("a") as file:
            print(json.dumps(found[case]), file=file)
        print(f"{case}: {found[case]['total'] / gpus.GIB:.1f} GiB", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
