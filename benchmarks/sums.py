"""How far gradients that devices add up in bfloat16 are from those added up in float32.

    python -m benchmarks.sums CHECKPOINT FOLDER      FOLDER: written by `prepare`

Each device has one photograph and the checkpoint with a new classifier. The sums are simulated in NumPy: in a ring
each device rounds what it passes on, in a tree there are fewer such hops. Prints the norm of the difference by that of
the gradient.
"""

import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from vit_nabirds.data.photographs import open_split
from vit_nabirds.data.table import class_names, read_table
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import to_float, zscore
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.recipe.loss import cross_entropy

PARAMETERS = ["encoder/layers/0/attn/query/kernel", "encoder/layers/6/mlp/layers/0/kernel", "final_norm/scale"]


def gradients(name: str, folder: Path, count: int) -> dict[str, np.ndarray]:
    """Of each of `count` photographs: (count, elements) for each of PARAMETERS."""
    table, checkpoint = read_table(folder), open_checkpoint(name)
    photographs, species = open_split(folder, table, "test"), class_names(table)
    model = describe(checkpoint.architecture, len(species), "bfloat16")
    params = model.initial_params(0) | checkpoint.load(checkpoint.architecture, species)
    head = params["classifier/kernel"]
    params["classifier/kernel"] = jax.random.normal(jax.random.key(0), head.shape) * head.shape[0] ** -0.5

    @jax.jit
    def gradient(image: jax.Array, label: jax.Array) -> list[jax.Array]:
        pixels = zscore(to_float(image[None]), checkpoint.normalization)
        chosen = {path: params[path] for path in PARAMETERS}
        found = jax.grad(lambda own: cross_entropy(model.logits(params | own, pixels), label[None])[0])(chosen)
        return [found[path].ravel() for path in PARAMETERS]

    found, image = [], np.empty((photographs.size, photographs.size, 3), np.uint8)
    for index in np.linspace(0, len(photographs) - 1, count).astype(int):
        photographs.read(index, image)
        found.append(jax.device_get(gradient(image, photographs.labels[index])))
    return {path: np.stack(arrays) for path, arrays in zip(PARAMETERS, zip(*found, strict=True), strict=True)}


def ring(parts: np.ndarray) -> np.ndarray:
    total = parts[0].astype(ml_dtypes.bfloat16)
    for part in parts[1:]:
        total = (total.astype(np.float32) + part.astype(ml_dtypes.bfloat16).astype(np.float32)).astype(
            ml_dtypes.bfloat16
        )
    return total.astype(np.float32)


def tree(parts: np.ndarray) -> np.ndarray:
    level = parts.astype(ml_dtypes.bfloat16)
    while len(level) > 1:
        level = (level[::2].astype(np.float32) + level[1::2].astype(np.float32)).astype(ml_dtypes.bfloat16)
    return level[0].astype(np.float32)


if __name__ == "__main__":
    found = gradients(sys.argv[1], Path(sys.argv[2]), 512)
    print("| parameter | devices | ring | tree | float32 |\n|---|---:|---:|---:|---:|")
    for path, parts in found.items():
        for devices in (8, 64, 512):
            exact = parts[:devices].astype(np.float64).sum(0)
            sums = ring(parts[:devices]), tree(parts[:devices]), parts[:devices].sum(0, dtype=np.float32)
            errors = [np.linalg.norm(total - exact) / np.linalg.norm(exact) for total in sums]
            print(f"| `{path}` | {devices} | {' | '.join(f'{error:.2g}' for error in errors)} |", flush=True)
