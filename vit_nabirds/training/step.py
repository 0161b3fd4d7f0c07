"""The compiled training step: a state and a batch in, the next state and metrics out."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from vit_nabirds.config import Config
from vit_nabirds.models.model import Model
from vit_nabirds.models.normalization import Normalization, zscore
from vit_nabirds.parallel.sharding import AXES, layout, spec_of
from vit_nabirds.recipe.augmentation import augment, image_keys
from vit_nabirds.recipe.averages import ema
from vit_nabirds.recipe.mixing import mix
from vit_nabirds.training.gradients import LossFn, loss_and_gradients, mean_over_devices, mean_over_parts
from vit_nabirds.training.state import TrainState


def step_keys(seed: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of a step for augmentation and for dropout."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return augment_key, dropout_key


def checksum(rows: jax.Array) -> jax.Array:
    """uint32 that differs for batches of other records, or of the same ones in another order."""
    odd = 2 * jnp.arange(len(rows), dtype=jnp.uint32) + 1
    return jnp.sum(odd * (rows.astype(jnp.uint32) + 1))


def make_train_step(
    config: Config,
    model: Model,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    trainable: list[str],
    loss_fn: LossFn,
    normalization: Normalization,
    mesh: jax.sharding.Mesh,
    microbatch: int = 0,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Jitted (state, batch) -> (state, metrics). The state is donated; metrics are means over the global batch.

    Where the loss or a gradient is not finite, the state stays as it was, but for its step, and `finite` is False.
    With `microbatch`, each device works on so many of its images at once.
    """
    add_up = functools.partial(mean_over_devices, model, config.gradient_dtype)
    specs = {path: spec_of(x.shape, mesh.shape["fsdp"]) for path, x in model.shapes.items()}

    def on_device(params: dict, step: jax.Array, images: jax.Array, labels: jax.Array) -> tuple:
        """Loss, metrics and gradients of the global batch, of which this device has a part."""
        positions = jax.lax.axis_index(AXES) * len(images) + jnp.arange(len(images))

        def of_part(images: jax.Array, labels: jax.Array, positions: jax.Array, add_up: Callable = dict) -> tuple:
            images, targets = augmented(config, model, step, images, labels, positions)
            images, keys = zscore(images, normalization), image_keys(step_keys(config.seed, step)[1], positions)
            return loss_and_gradients(
                model, loss_fn, trainable, add_up, config.gradient_dtype, params, images, targets, keys
            )

        if microbatch in (0, len(images)):
            loss, metrics, gradients = of_part(images, labels, positions, add_up)
        else:
            count = len(images) // microbatch
            loss, metrics, gradients = mean_over_parts(of_part, (images, labels, positions), count)
            gradients = add_up(gradients)
        return *jax.lax.pmean((loss, metrics), AXES), gradients

    gradients_of = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, P(), P(AXES), P(AXES)),
        out_specs=(P(), P(), {path: specs[path] for path in trainable}),
        check_vma=False,  # it takes what a barrier returns for different on each device
    )  # fmt: skip

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        loss, metrics, gradients = gradients_of(state.params, state.step, batch["image"], batch["label"])
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        before = {path: state.params[path] for path in trainable}, state.opt_state, state.ema
        updates, opt_state = tx.update(gradients, state.opt_state, before[0])
        params = optax.apply_updates(before[0], updates)
        average = ema(state.ema, params, config.ema_decay, state.step) if config.ema_decay else None
        after = jax.tree.map(functools.partial(jnp.where, finite), (params, opt_state, average), before)
        params, opt_state, average = after
        metrics |= {
            "train/loss": loss,
            "train/learning_rate": schedule(state.step),
            "train/gradient_norm": norm,
            "records": checksum(batch["row"]),
            "finite": finite,
        }
        state = dataclasses.replace(
            state, step=state.step + 1, params=state.params | params, opt_state=opt_state, ema=average
        )
        return jax.lax.with_sharding_constraint(state, layout(state, mesh)), metrics

    return model.jit(train_step, donate_argnums=0)


def augmented(
    config: Config, model: Model, step: jax.Array, images: jax.Array, labels: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a model sees in a step of the uint8 images and labels at these positions of the global batch: float32 images
    in [0, 1], and targets (the labels, or shares of all classes where images are mixed)."""
    settings, keys = config.augment, image_keys(step_keys(config.seed, step)[0], positions)
    images = augment(images, keys, model.architecture["image_size"], settings)
    if not is_mixed(config):
        return images, labels
    return mix(images, jax.nn.one_hot(labels, model.num_classes), keys, settings)


def is_mixed(config: Config) -> bool:
    return config.augment.mixup > 0 or config.augment.cutmix > 0
