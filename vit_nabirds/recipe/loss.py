"""The loss of a batch, and what is reported beside it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_nabirds.config.fields import Loss

Metrics = dict[str, jax.Array]


def make_loss(settings: Loss, class_counts: np.ndarray) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, Metrics]]:
    """(logits, targets) -> (loss, metrics), as `cross_entropy`.

    `class_counts`, int (classes), are the training photographs of each class. Weights are fixed numbers, so the mean
    over equal parts of a batch is that over the batch.
    """
    if settings == Loss():
        return cross_entropy
    losses_of = {"cross_entropy": optax.softmax_cross_entropy, "binary": binary_cross_entropy}[settings.name]
    weights = balanced_weights(class_counts) if settings.class_weights == "balanced" else None

    def loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, Metrics]:
        shares = targets if targets.ndim == 2 else jax.nn.one_hot(targets, logits.shape[-1])
        # A class of which a mixed image shows anything is there (Touvron et al., 2022), but for what may be rounding.
        present = (shares > 1e-3).astype(jnp.float32) if settings.name == "binary" else shares
        losses = losses_of(logits, optax.smooth_labels(present, settings.label_smoothing))
        if weights is not None:
            losses *= jnp.sum(shares * weights, -1)
        return losses.mean(), {"train/accuracy": _accuracy(logits, targets)}

    return loss


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of float32 logits (batch, classes): means over the batch.

    `targets` are labels, int32 (batch), or each image's shares of the classes after mixing, float32 (batch, classes).
    """
    if targets.ndim == 2:
        losses = optax.softmax_cross_entropy(logits, targets)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean(), {"train/accuracy": _accuracy(logits, targets)}


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 (batch): the mean over the classes of whether each is there, by its own sigmoid (Wightman et al., 2021).

    `targets` in [0, 1] and logits are float32 (batch, classes). A mean, as in timm and DeiT III: it is smaller than the
    sum by the number of classes, which a learning rate of sgd or a clip_norm has to follow.
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)


def balanced_weights(class_counts: np.ndarray) -> np.ndarray:
    """float32 (classes): the inverse of each class's photographs, scaled so that the mean over all photographs is 1.

    A class without photographs weighs 0.
    """
    there = class_counts > 0
    weights = class_counts.sum() / (there.sum() * np.maximum(class_counts, 1))
    return np.where(there, weights, 0).astype(np.float32)


def _accuracy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The share of the images whose largest logit is that of their class, or of the larger part of a mixed one."""
    labels = targets if targets.ndim == 1 else jnp.argmax(targets, -1)
    return jnp.mean(jnp.argmax(logits, -1) == labels)
