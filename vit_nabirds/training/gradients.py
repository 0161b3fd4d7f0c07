"""Loss and gradients of a batch that is shared among the devices of a mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_nabirds.models.model import Model


def loss_and_gradients(
    model: Model,
    loss_fn: Callable[[jax.Array, jax.Array], tuple[jax.Array, dict]],
    trainable: list[str],
    params: dict[str, jax.Array],
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    axis: str,
    dtype: str,
) -> tuple[jax.Array, dict, dict[str, jax.Array]]:
    """Loss, metrics and gradients of the trainable parameters: of this device's images, averaged over `axis`.

    While a stage of the model is differentiated, the devices sum the gradients of the stage behind it, in `dtype`. The
    barriers keep that order: left alone, XLA on GPUs holds the activations of many stages to compute the gradients
    of their parameters last, and then nothing is left to compute while they are summed (docs/gpu.md).
    """
    stages = [functools.partial(model.stage, number, params, keys) for number in range(model.num_stages)]
    own = [{path: params[path] for path in trainable if model.stage_of(path) == n} for n in range(model.num_stages)]
    first = next(number for number, parameters in enumerate(own) if parameters)
    x = images
    for stage in stages[:first]:
        x = stage({}, x)

    x, pull_first = jax.vjp(functools.partial(stages[first], x=x), own[first])  # of x no gradient is needed
    pullbacks = []
    for number in range(first + 1, model.num_stages):
        differentiate = forward_again if model.computes_again(number) else jax.vjp
        x, pullback = differentiate(stages[number], own[number], x)
        pullbacks.append(pullback)
    loss, pullback, metrics = jax.vjp(functools.partial(loss_fn, labels=labels), x, has_aux=True)
    (gradient,) = pullback(jnp.ones_like(loss))

    gradients, summed = {}, {}
    while pullbacks:
        computed, gradient = pullbacks.pop()(gradient)
        computed, gradient, summed = jax.lax.optimization_barrier((computed, gradient, summed))
        gradients |= summed
        summed = mean(computed, axis, dtype)
    (computed,) = pull_first(gradient)
    computed, summed = jax.lax.optimization_barrier((computed, summed))
    gradients |= summed | mean(computed, axis, dtype)
    return *jax.lax.pmean((loss, metrics), axis), gradients


def forward_again(stage: Callable, parameters: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, Callable]:
    """`jax.vjp`, but all that is kept for the backward pass is x: the rest is computed again."""

    def pullback(gradient: jax.Array) -> tuple:
        # Not before the gradient is there.
        again, gradient = jax.lax.optimization_barrier((x, gradient))
        return jax.vjp(stage, parameters, again)[1](gradient)

    return stage(parameters, x), pullback


def mean(gradients: dict[str, jax.Array], axis: str, dtype: str) -> dict[str, jax.Array]:
    """float32 means over `axis` of float32 gradients, added up in `dtype`."""
    if jax.lax.axis_size(axis) == 1:
        return gradients
    narrow = jax.tree.map(lambda x: x.astype(dtype), gradients)
    return jax.tree.map(lambda x: x.astype(jnp.float32), jax.lax.pmean(narrow, axis))
