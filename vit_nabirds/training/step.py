"""The compiled training step: a state and a batch in, the next state and metrics out."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from vit_nabirds.models.model import Model
from vit_nabirds.models.normalization import Normalization, zscore
from vit_nabirds.recipe.augmentation import augment
from vit_nabirds.recipe.loss import cross_entropy
from vit_nabirds.training.gradients import loss_and_gradients
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
    model: Model,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    trainable: list[str],
    normalization: Normalization,
    seed: int,
    mesh: jax.sharding.Mesh,
    gradient_dtype: str = "float32",
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Jitted (state, batch) -> (state, metrics). The state is donated; metrics are means over the global batch."""
    crop = model.architecture["image_size"]
    gradients_of = jax.shard_map(
        functools.partial(loss_and_gradients, model, cross_entropy, trainable, axis="data", dtype=gradient_dtype),
        mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P(),
        check_vma=False,  # it takes what a barrier returns for different on each device
    )  # fmt: skip

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        augment_key, dropout_key = step_keys(seed, state.step)
        images = zscore(augment(batch["image"], augment_key, crop), normalization)
        # One for each image, by its place in the global batch: the same on any number of devices.
        keys = jax.vmap(functools.partial(jax.random.fold_in, dropout_key))(jnp.arange(len(images)))
        loss, metrics, gradients = gradients_of(state.params, images, batch["label"], keys)
        params = {path: state.params[path] for path in trainable}
        updates, opt_state = tx.update(gradients, state.opt_state, params)
        metrics |= {
            "train/loss": loss,
            "train/learning_rate": schedule(state.step),
            "train/gradient_norm": optax.tree.norm(gradients),
            "records": checksum(batch["row"]),
        }
        params = state.params | optax.apply_updates(params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return model.jit(train_step, donate_argnums=0)
