"""The NNX module and its kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_nabirds.models.kernels import PORTABLE, kernels_for
from vit_nabirds.models.model import describe
from vit_nabirds.models.vit import TransformerEncoder, VisionTransformer, gelu

SHAPE = dict(image_size=16, patch_size=8, num_layers=2, num_heads=2, mlp_dim=32, hidden_size=16)


def test_attributes_and_display(capsys):
    vit = VisionTransformer(num_classes=5, **SHAPE, rngs=nnx.Rngs(0))
    for name in ("patch_embeddings", "position_embeddings", "cls_token", "encoder", "final_norm", "classifier"):
        assert hasattr(vit, name)
    block = vit.encoder.layers[0]
    assert isinstance(block, TransformerEncoder)
    for name in ("norm1", "attn", "norm2", "mlp"):
        assert hasattr(block, name)
    nnx.display(vit)
    assert "VisionTransformer" in capsys.readouterr().out
    assert vit(jnp.zeros((2, 16, 16, 3))).shape == (2, 5)


def test_dropout_needs_a_key_and_follows_it():
    vit = VisionTransformer(num_classes=5, **SHAPE, dropout_rate=0.5, rngs=nnx.Rngs(0))
    vit.classifier.kernel[...] = jnp.ones((16, 5)) * jnp.arange(5)
    vit.final_norm.scale[...] = jnp.arange(16.0)
    images = jnp.ones((2, 16, 16, 3))
    plain, again = vit(images), vit(images)
    one, same, other = (vit(images, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2))
    assert np.array_equal(plain, again) and np.array_equal(one, same)
    assert not np.allclose(one, plain) and not np.allclose(one, other)


def test_bfloat16_computes_near_float32_with_float32_parameters():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    params = describe(SHAPE, 5).initial_params(seed=0)
    params["classifier/kernel"] += np.random.default_rng(1).normal(size=(16, 5))
    exact, near = (describe(SHAPE, 5, dtype).logits(params, images) for dtype in ("float32", "bfloat16"))
    assert all(value.dtype == jnp.float32 for value in params.values()) and near.dtype == jnp.float32
    assert 0 < np.abs(exact - near).max() < 0.1


def test_shapes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="multiple of patch_size"):
        VisionTransformer(image_size=20, patch_size=8, rngs=nnx.Rngs(0))


def test_gelu_is_the_exact_one_and_so_is_its_gradient():
    x = jnp.linspace(-8, 8, 1001)
    reference = functools.partial(jax.nn.gelu, approximate=False)
    np.testing.assert_array_equal(gelu(x), reference(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), jax.vmap(jax.grad(reference))(x), atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_attention_is_that_of_jax(platform):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 7, 3, 8))

    def gradients(attention):
        return jax.grad(lambda *arrays: (attention(*arrays) * jnp.arange(8)).sum(), (0, 1, 2))(query, key, value)

    ours, reference = gradients(kernels_for(platform).attention), gradients(jax.nn.dot_product_attention)
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_platform_sets_barriers_and_compiler_options():
    def program(platform):
        model = describe(SHAPE, 4, platform=platform)
        return model, model.jit(model.logits).lower(model.shapes, jnp.zeros((2, 16, 16, 3))).as_text()

    (cpu, cpu_text), (tpu, tpu_text) = program("cpu"), program("tpu")
    assert cpu_text.count("optimization_barrier") == 2 * SHAPE["num_layers"] and "optimization_barrier" not in tpu_text
    assert cpu.kernels.compiler_options and tpu.kernels == PORTABLE
    assert cpu.shapes == tpu.shapes and cpu.graphdef != tpu.graphdef
    again = describe(SHAPE, 4, platform="cpu").graphdef
    assert again == cpu.graphdef and hash(again) == hash(cpu.graphdef)


def test_recomputed_activations_give_the_same_gradient():
    """With dropout, which must drop the same activations in both passes."""
    params = describe(SHAPE, 4).initial_params(seed=0)
    params["classifier/kernel"] = jnp.ones((16, 4)) * jnp.arange(4)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def gradient(remat):
        model = describe(SHAPE, 4, dropout_rate=0.3, remat=remat)
        return jax.jit(jax.grad(lambda params: (model.logits(params, images, nnx.Rngs(dropout=7)) ** 2).sum()))

    kept, again = gradient(False).lower(params).compile(), gradient(True).lower(params).compile()
    for path, x in kept(params).items():
        np.testing.assert_allclose(again(params)[path], x, rtol=1e-4, atol=1e-3, err_msg=path)
    assert again.as_text().count("erf") > kept.as_text().count("erf")
