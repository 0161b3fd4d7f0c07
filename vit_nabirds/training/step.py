"""The compiled training step: a state and a batch in, the next state and metrics out."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vit_nabirds.models.model import Model
from vit_nabirds.models.normalization import Normalization, zscore
from vit_nabirds.recipe.augmentation import augment
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
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Jitted (state, batch) -> (state, metrics). The state is donated; metrics are means over the global batch."""
    crop = model.architecture["image_size"]

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        augment_key, dropout_key = step_keys(seed, state.step)
        images = zscore(augment(batch["image"], augment_key, crop), normalization)

        def loss_fn(params: dict) -> tuple[jax.Array, jax.Array]:
            logits = model.logits(state.params | params, images, nnx.Rngs(dropout=dropout_key))
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), logits

        params = {path: state.params[path] for path in trainable}
        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, state.opt_state, params)
        metrics = {
            "train/loss": loss,
            "train/accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"]),
            "train/learning_rate": schedule(state.step),
            "train/gradient_norm": optax.tree.norm(gradients),
            "records": checksum(batch["row"]),
        }
        params = state.params | optax.apply_updates(params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return model.jit(train_step, donate_argnums=0)
