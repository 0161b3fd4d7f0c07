"""Gradients of a shared batch, and dropout in it, against plain differentiation on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vit_nabirds.models.model import describe
from vit_nabirds.parallel.devices import make_mesh
from vit_nabirds.parallel.sharding import AXES, layout, spec_of
from vit_nabirds.recipe.loss import cross_entropy
from vit_nabirds.training.gradients import loss_and_gradients, mean_over_devices, mean_over_parts

SHAPE = dict(image_size=16, patch_size=8, num_layers=2, num_heads=2, mlp_dim=32, hidden_size=16)
IMAGES, LABELS = jax.random.normal(jax.random.key(1), (4, 16, 16, 3)), jnp.arange(4)
KEYS = jax.random.split(jax.random.key(2), 4)


def parameters(model):
    params = model.initial_params(seed=0)
    params["classifier/kernel"] = jax.random.normal(jax.random.key(3), params["classifier/kernel"].shape)
    return params


def shared(model, trainable, num_devices, dtype="float32", fsdp=1, parts=1):
    mesh = make_mesh(fsdp, jax.devices()[:num_devices])
    add_up = functools.partial(mean_over_devices, model, dtype)

    def on_device(params, *batch):
        function = functools.partial(loss_and_gradients, model, cross_entropy, trainable, dict, dtype, params)
        loss, metrics, gradients = mean_over_parts(function, batch, parts) if parts > 1 else function(*batch)
        return *jax.lax.pmean((loss, metrics), AXES), add_up(gradients)

    specs = {path: spec_of(x.shape, fsdp) for path, x in model.shapes.items()}
    step = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, P(AXES), P(AXES), P(AXES)),
        out_specs=(P(), P(), {path: specs[path] for path in trainable}), check_vma=False,
    )  # fmt: skip
    return jax.jit(step, in_shardings=(layout(model.shapes, mesh), None, None, None))


def plain(model, trainable):
    def loss_of(params, rest):
        return cross_entropy(model.logits(rest | params, IMAGES, KEYS), LABELS)

    params = parameters(model)
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        {path: params[path] for path in trainable}, params
    )
    return loss, metrics, gradients


@pytest.mark.parametrize(
    "num_devices, options, remat, trainable",
    [
        (1, {}, "none", ""),
        (2, {}, "blocks", ""),
        (2, {}, "none", "classifier"),
        (2, {}, "blocks", "layers/0/attn"),
        (1, {}, "blocks", "bias"),
        (2, {}, "elementwise", ""),
        (2, {"fsdp": 2}, "none", ""),
        (2, {"fsdp": 2}, "blocks", "layers/1"),
        (2, {"fsdp": 2}, "elementwise", "kernel"),
        (1, {"parts": 4}, "none", ""),
        (2, {"fsdp": 2, "parts": 2}, "blocks", ""),
    ],
)
def test_they_are_those_of_the_whole_batch(num_devices, options, remat, trainable):
    """With dropout, which must drop the same activations on any number of devices and when it is computed again."""
    model = describe(SHAPE, 4, dropout_rate=0.3, remat=remat)
    paths = [path for path in model.shapes if trainable in path]
    ours = shared(model, paths, num_devices, **options)(parameters(model), IMAGES, LABELS, KEYS)
    assert list(sorted(ours[2])) == sorted(paths)
    # Gradients are as large as 50.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-4), ours, plain(model, paths))


def test_with_remat_the_backward_pass_computes_again_what_it_names():
    def count(remat, what):
        model = describe(SHAPE, 4, remat=remat)
        step = shared(model, list(model.shapes), 1)
        return step.lower(parameters(model), IMAGES, LABELS, KEYS).as_text().count(what)

    again = {
        what: [remat for remat in ("elementwise", "blocks") if count(remat, what) > count("none", what)]
        for what in ("erfc", "dot_general")
    }
    # Attention's products of two activations are computed again with the rest.
    assert again == {"erfc": ["elementwise", "blocks"], "dot_general": ["elementwise", "blocks"]}
    assert count("elementwise", "dot_general") < count("blocks", "dot_general")


def test_half_of_the_bytes_are_sent_by_choice_and_the_result_is_near():
    model = describe(SHAPE, 4)
    arguments = (parameters(model), IMAGES, LABELS, KEYS)
    for fsdp in (1, 2):
        exact, near = (shared(model, list(model.shapes), 2, dtype, fsdp) for dtype in ("float32", "bfloat16"))
        assert "xbf16>" not in exact.lower(*arguments).as_text() and "xbf16>" in near.lower(*arguments).as_text()
        for a, b in zip(*(jax.tree.leaves(step(*arguments)[2]) for step in (exact, near)), strict=True):
            assert a.dtype == b.dtype == jnp.float32
            assert np.linalg.norm(a - b) <= 2**-7 * np.linalg.norm(a) + 1e-7


def test_with_fsdp_a_device_has_its_part_of_each_matrix_and_parameters_are_sent_in_the_dtype_of_the_work():
    model = describe(SHAPE, 4, "bfloat16")
    step = shared(model, list(model.shapes), 2, fsdp=2)
    _, _, gradients = step(parameters(model), IMAGES, LABELS, KEYS)
    for path, x in gradients.items():
        matrix = sum(length > 1 for length in x.shape) > 1
        part = x.addressable_shards[0].data
        assert part.size == (x.size // 2 if matrix else x.size), path
    text = step.lower(parameters(model), IMAGES, LABELS, KEYS).as_text()
    gathers = [line for line in text.splitlines() if "all_gather" in line and "tensor" in line]
    of_blocks = [line for line in gathers if "bf16" in line]
    # Six matrices of each block, patches and positions; the classifier in float32.
    assert len(of_blocks) >= 2 * 6 + 2 and len(gathers) > len(of_blocks)
