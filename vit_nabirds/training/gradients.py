"""Loss and gradients of a batch that is shared among the devices of a mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_nabirds.models.model import Model
from vit_nabirds.parallel.sharding import AXES, split_axis

LossFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict]]


def loss_and_gradients(
    model: Model,
    loss_fn: LossFn,
    trainable: list[str],
    add_up: Callable[[dict], dict],
    sum_dtype: str,
    params: dict[str, jax.Array],
    images: jax.Array,
    targets: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, dict, dict[str, jax.Array]]:
    """Loss and metrics of this device's images, and gradients of the trainable parameters after `add_up`.

    Of each parameter a device has all, or its part, and gets that of the gradient, summed over `fsdp` in `sum_dtype`.

    While a stage of the model is differentiated, `add_up` sums the gradients of the stage behind it over the devices.
    The barriers keep that order: left alone, XLA on GPUs holds the activations of many stages to compute the gradients
    of their parameters last, and then nothing is left to compute while they are summed (docs/gpu.md).
    """
    stage = functools.partial(model.stage, sum_dtype=sum_dtype)
    stages = [functools.partial(stage, number, params, keys) for number in range(model.num_stages)]
    own = [{path: params[path] for path in trainable if model.stage_of(path) == n} for n in range(model.num_stages)]
    first = next(number for number, parameters in enumerate(own) if parameters)
    x = images
    for stage in stages[:first]:
        x = stage({}, x)

    x, pull_first = jax.vjp(functools.partial(stages[first], x=x), own[first])  # of x no gradient is needed
    pullbacks = []
    for number in range(first + 1, model.num_stages):
        x, pullback = vjp(stages[number], model.kept_of(number), own[number], x)
        pullbacks.append(pullback)
    loss, pullback, metrics = jax.vjp(functools.partial(loss_fn, targets=targets), x, has_aux=True)
    (gradient,) = pullback(jnp.ones_like(loss))

    gradients, summed = {}, {}
    while pullbacks:
        computed, gradient = pullbacks.pop()(gradient)
        computed, gradient, summed = jax.lax.optimization_barrier((computed, gradient, summed))
        gradients |= summed
        summed = add_up(computed)
    (computed,) = pull_first(gradient)
    computed, summed = jax.lax.optimization_barrier((computed, summed))
    return loss, metrics, gradients | summed | add_up(computed)


def vjp(stage: Callable, kept: Callable | None, parameters: dict, x: jax.Array) -> tuple[jax.Array, Callable]:
    """`jax.vjp`; with `kept`, a policy of `jax.checkpoint`, the backward pass computes all else again."""
    if kept is None:
        return jax.vjp(stage, parameters, x)
    y, pullback = jax.vjp(jax.checkpoint(stage, policy=kept, prevent_cse=False), parameters, x)

    def later(gradient: jax.Array) -> tuple:
        again, gradient = jax.lax.optimization_barrier((pullback, gradient))  # not before the gradient is there
        return again(gradient)

    return y, later


def mean_over_devices(model: Model, dtype: str, gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """float32 means of float32 gradients, added up in `dtype`; over `fsdp` only of what it does not split."""

    def mean(path: str, x: jax.Array) -> jax.Array:
        axes = AXES if split_axis(x, model.shapes[path].shape) is None else ("data",)
        return x if jax.lax.axis_size(axes) == 1 else jax.lax.pmean(x.astype(dtype), axes).astype(jnp.float32)

    return {path: mean(path, x) for path, x in gradients.items()}


def mean_over_parts(function: Callable, parts: tuple, count: int) -> object:
    """The mean of what `function` gives for each of `count` equal parts of the arrays, one part after the other."""
    parts = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), parts)

    def add(total: object, part: tuple) -> tuple[object, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *jax.tree.map(lambda x: x[0], parts)))
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / count, total)
