"""Our training step for a shape, without a run: for benchmarks of the step and audits of the compiled program."""

import jax
import numpy as np
import optax

from vit_nabirds.config import Config, default
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.sharding import laid_out
from vit_nabirds.recipe.loss import cross_entropy
from vit_nabirds.runs.checkpoints import placed
from vit_nabirds.training.state import TrainState
from vit_nabirds.training.step import make_train_step

CLASSES = 404


def training_step(
    shape: dict,
    mesh: jax.sharding.Mesh,
    compute_dtype: str = "float32",
    remat: str = "none",
    gradient_dtype: str = "float32",
    microbatch: int = 0,
):
    """(jitted step, function that makes the first state, its shapes and shardings) with AdamW; augments larger
    uint8 images."""
    config = default()
    config.data.root, config.gradient_dtype = "data", gradient_dtype
    model = describe(shape, CLASSES, compute_dtype, remat=remat, device=devices.own(mesh))
    tx, trainable = optax.adamw(1e-4, weight_decay=0.05), list(model.shapes)
    step = make_train_step(
        Config.read(config), model, tx, lambda _: 1e-4, trainable, cross_entropy, Normalization(), mesh, microbatch
    )  # fmt: skip

    def first_state() -> TrainState:
        return TrainState.initial(model.initial_params(0), tx, trainable)

    return step, first_state, laid_out(jax.eval_shape(first_state), mesh)


def batch_shapes(shape: dict, batch_size: int, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch whose images are 1.2 times as large as the model's."""
    side = round(1.2 * shape["image_size"])
    image = jax.ShapeDtypeStruct((batch_size, side, side, 3), np.uint8)
    number = jax.ShapeDtypeStruct((batch_size,), np.int32)
    return placed({"image": image, "label": number, "row": number}, devices.over_batch(mesh))
