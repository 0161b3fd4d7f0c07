"""The NNX module: the names and arguments that its users know."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_nabirds import model

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
