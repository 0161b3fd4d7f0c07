"""The NNX module: the names and arguments that its users know."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_nabirds.models import vit as model
from vit_nabirds.training import state

SHAPE = dict(img_size=16, patch_size=8, num_layers=2, num_heads=2, mlp_dim=32, hidden_size=16)


def test_attributes_and_display(capsys):
    vit = model.VisionTransformer(num_classes=5, **SHAPE, rngs=nnx.Rngs(0))
    for name in ("patch_embeddings", "position_embeddings", "cls_token", "encoder", "final_norm", "classifier"):
        assert hasattr(vit, name)
    block = vit.encoder.layers[0]
    assert isinstance(block, model.TransformerEncoder)
    for name in ("norm1", "attn", "norm2", "mlp"):
        assert hasattr(block, name)
    nnx.display(vit)
    assert "VisionTransformer" in capsys.readouterr().out
    assert vit(jnp.zeros((2, 16, 16, 3))).shape == (2, 5)


def test_dropout_needs_a_key_and_follows_it():
    vit = model.VisionTransformer(num_classes=5, **SHAPE, dropout_rate=0.5, rngs=nnx.Rngs(0))
    vit.classifier.kernel[...] = jnp.ones((16, 5)) * jnp.arange(5)
    vit.final_norm.scale[...] = jnp.arange(16.0)
    images = jnp.ones((2, 16, 16, 3))
    plain, again = vit(images), vit(images)
    one, same, other = (vit(images, rngs=nnx.Rngs(dropout=seed)) for seed in (1, 1, 2))
    assert np.array_equal(plain, again) and np.array_equal(one, same)
    assert not np.allclose(one, plain) and not np.allclose(one, other)


def test_bfloat16_computes_near_float32_with_float32_parameters():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    params = model.initial_params(SHAPE, 5, seed=0)
    params["classifier/kernel"] += np.random.default_rng(1).normal(size=(16, 5))
    exact, near = (model.apply(model.describe(SHAPE, 5, dtype)[0], params, images) for dtype in ("float32", "bfloat16"))
    assert all(value.dtype == jnp.float32 for value in params.values()) and near.dtype == jnp.float32
    assert 0 < np.abs(exact - near).max() < 0.1


def test_shapes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="multiple of patch_size"):
        model.VisionTransformer(img_size=20, patch_size=8, rngs=nnx.Rngs(0))


def test_gelu_is_the_exact_one_and_so_is_its_gradient():
    x = jnp.linspace(-8, 8, 1001)
    reference = functools.partial(jax.nn.gelu, approximate=False)
    np.testing.assert_array_equal(model.gelu(x), reference(x))
    np.testing.assert_allclose(jax.vmap(jax.grad(model.gelu))(x), jax.vmap(jax.grad(reference))(x), atol=1e-6)


def test_attention_is_that_of_jax():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 7, 3, 8))
    options = dict(dropout_rate=0.0, deterministic=True)

    def total(function, *arrays):
        return (function(*arrays) * jnp.arange(8)).sum()

    ours = jax.grad(functools.partial(total, functools.partial(model.attention, **options)), (0, 1, 2))
    reference = jax.grad(functools.partial(total, jax.nn.dot_product_attention), (0, 1, 2))
    for a, b in zip(ours(query, key, value), reference(query, key, value), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_activations_made_again_give_the_same_gradient():
    """With dropout, whose draws must be the same in both passes."""
    params = model.initial_params(SHAPE, 4, seed=0)
    params["classifier/kernel"] = jnp.ones((16, 4)) * jnp.arange(4)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def gradient(remat):
        graphdef, _ = model.describe(SHAPE, 4, dropout_rate=0.3, remat=remat)
        return jax.jit(jax.grad(lambda params: (model.apply(graphdef, params, images, nnx.Rngs(dropout=7)) ** 2).sum()))

    kept, again = gradient(False).lower(params).compile(), gradient(True).lower(params).compile()
    for path, x in kept(params).items():
        np.testing.assert_allclose(again(params)[path], x, rtol=1e-4, atol=1e-3, err_msg=path)
    assert again.as_text().count("erf") > kept.as_text().count("erf")


def test_packed_parameters_are_fewer_and_come_back_as_they_were():
    shape = SHAPE | {"num_layers": 3}
    params = model.initial_params(shape, 4, seed=0)
    params = {path: x + i for i, (path, x) in enumerate(params.items())}
    trainable = [path for path in params if path.startswith(("encoder/layers/1/", "classifier/"))]
    frozen = [path for path in params if path not in trainable]
    trained = state.group(trainable, params)
    groups = trained | state.group(frozen, params)
    packed = state.pack(params, groups)
    assert len(packed) < len(params) * 0.6 and sum(x.size for x in packed.values()) == sum(
        x.size for x in params.values()
    )
    assert {path for name in trained for path in groups[name]} == set(trainable)
    back = state.unpack(packed, groups)
    assert set(back) == set(params) and all(np.array_equal(back[path], params[path]) for path in params)
