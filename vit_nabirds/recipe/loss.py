"""The loss of a batch, and what is reported beside it."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of float32 logits (batch, classes) and int32 labels (batch): means over the batch."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), {"train/accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}
