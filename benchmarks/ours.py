"""Our training step for a shape, without a run: for benchmarks of the step and audits of the compiled program."""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import numpy as np

from vit_nabirds.config import Config, default
from vit_nabirds.config.plan import Plan
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.sharding import laid_out, layout
from vit_nabirds.recipe.loss import make_loss
from vit_nabirds.recipe.optimizer import make_optimizer, make_schedule
from vit_nabirds.recipe.rules import parameter_rules, trained_paths
from vit_nabirds.runs.checkpoints import placed
from vit_nabirds.training.state import TrainState
from vit_nabirds.training.step import make_train_step

CLASSES = 404


def training_step(shape: dict, mesh: jax.sharding.Mesh, fields: Mapping[str, object] = MappingProxyType({})):
    """(jitted step, function that makes the first state, its shapes and shardings), of the default configuration with
    these `fields`, by dotted name. It augments larger uint8 images."""
    config = default()
    config.update_from_flattened_dict({"data.root": "data", "optimizer.weight_decay": 0.05, **fields})
    config = Config.read(config)
    model = describe(
        shape, CLASSES, config.compute_dtype, config.model.dropout_rate, config.remat, device=devices.own(mesh),
        drop_path=config.model.drop_path, lora=config.lora,
    )  # fmt: skip
    rules, schedule = parameter_rules(config, model), make_schedule(config, Plan.of(config, 100 * config.batch_size))
    trainable, tx = trained_paths(rules), make_optimizer(config, schedule, rules)
    loss_fn = make_loss(config.loss, np.ones(CLASSES))
    step = make_train_step(
        config, model, tx, schedule, trainable, loss_fn, Normalization(), mesh, config.microbatch
    )  # fmt: skip

    def initial(params: dict[str, jax.Array]) -> TrainState:
        return TrainState.initial(params, tx, trainable, averages=config.ema_decay > 0)

    like = laid_out(jax.eval_shape(initial, model.shapes), mesh)

    def first_state() -> TrainState:
        return jax.jit(initial, out_shardings=layout(like, mesh))(model.initial_params(0))

    return step, first_state, like


def batch_shapes(shape: dict, batch_size: int, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch whose images are 1.2 times as large as the model's."""
    side = round(1.2 * shape["image_size"])
    image = jax.ShapeDtypeStruct((batch_size, side, side, 3), np.uint8)
    number = jax.ShapeDtypeStruct((batch_size,), np.int32)
    return placed({"image": image, "label": number, "row": number}, devices.over_batch(mesh))
