"""Gradients of a shared batch, and dropout in it, against plain differentiation on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vit_nabirds.models.model import describe
from vit_nabirds.recipe.loss import cross_entropy
from vit_nabirds.training.gradients import loss_and_gradients

SHAPE = dict(image_size=16, patch_size=8, num_layers=2, num_heads=2, mlp_dim=32, hidden_size=16)
IMAGES, LABELS = jax.random.normal(jax.random.key(1), (4, 16, 16, 3)), jnp.arange(4)
KEYS = jax.random.split(jax.random.key(2), 4)


def parameters(model):
    params = model.initial_params(seed=0)
    params["classifier/kernel"] = jax.random.normal(jax.random.key(3), params["classifier/kernel"].shape)
    return params


def shared(model, trainable, num_devices, dtype="float32"):
    mesh = Mesh(jax.devices()[:num_devices], ("data",))
    function = functools.partial(loss_and_gradients, model, cross_entropy, trainable, axis="data", dtype=dtype)
    specs = dict(in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P())
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs, check_vma=False))


def plain(model, trainable):
    def loss_of(params, rest):
        return cross_entropy(model.logits(rest | params, IMAGES, KEYS), LABELS)

    params = parameters(model)
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        {path: params[path] for path in trainable}, params
    )
    return loss, metrics, gradients


@pytest.mark.parametrize(
    "num_devices, remat, trainable",
    [(1, False, ""), (2, True, ""), (2, False, "classifier"), (2, True, "layers/0/attn"), (1, True, "bias")],
)
def test_they_are_those_of_the_whole_batch(num_devices, remat, trainable):
    """With dropout, which must drop the same activations on any number of devices and when it is computed again."""
    model = describe(SHAPE, 4, dropout_rate=0.3, remat=remat)
    paths = [path for path in model.shapes if trainable in path]
    ours = shared(model, paths, num_devices)(parameters(model), IMAGES, LABELS, KEYS)
    assert list(sorted(ours[2])) == sorted(paths)
    # Gradients are as large as 50.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-4), ours, plain(model, paths))


def test_blocks_are_computed_again_only_with_remat():
    def count(remat):
        model = describe(SHAPE, 4, remat=remat)
        step = shared(model, list(model.shapes), 1)
        return step.lower(parameters(model), IMAGES, LABELS, KEYS).as_text().count("erfc")

    assert count(True) > count(False)


def test_half_of_the_bytes_are_sent_by_choice_and_the_result_is_near():
    model = describe(SHAPE, 4)
    exact, near = (shared(model, list(model.shapes), 2, dtype) for dtype in ("float32", "bfloat16"))
    arguments = (parameters(model), IMAGES, LABELS, KEYS)
    assert "xbf16>" not in exact.lower(*arguments).as_text() and "xbf16>" in near.lower(*arguments).as_text()
    for a, b in zip(*(jax.tree.leaves(step(*arguments)[2]) for step in (exact, near)), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert np.linalg.norm(a - b) <= 2**-7 * np.linalg.norm(a) + 1e-7
