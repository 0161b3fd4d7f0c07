"""The NNX module and its kernels."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vit_nabirds.config.fields import Lora
from vit_nabirds.models import cpu
from vit_nabirds.models.kernels import PORTABLE, Kernels, cudnn_attention, xla_attention
from vit_nabirds.models.model import describe
from vit_nabirds.models.vit import TransformerEncoder, VisionTransformer, drop_path, gelu

SHAPE = dict(image_size=16, patch_size=8, num_layers=2, num_heads=2, mlp_dim=32, hidden_size=16)
SEED = jax.random.key(0)


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
    one, same, other = (vit(images, jax.random.split(jax.random.key(seed), 2)) for seed in (1, 1, 2))
    assert np.array_equal(plain, again) and np.array_equal(one, same)
    assert not np.allclose(one, plain) and not np.allclose(one, other)


def test_each_branch_is_skipped_by_its_own_draw_of_each_image_at_a_rate_that_rises_with_depth():
    """Every image comes out of a block in one of four ways, of which each has its share."""
    count, options = 4000, dict(num_layers=3, drop_path=0.5, kernels=PORTABLE, rngs=nnx.Rngs(0))
    vit = VisionTransformer(num_classes=5, **SHAPE | options)
    tokens, keys = jnp.tile(vit.stage(0, jnp.ones((1, 16, 16, 3))), (count, 1, 1)), jax.random.split(SEED, count)
    assert np.array_equal(vit.stage(1, tokens, keys), vit.stage(1, tokens))
    for number, rate in {2: 0.25, 3: 0.5}.items():
        block, x, shares = vit.encoder.layers[number - 1], tokens[:1], {}
        queries = 1 if number == 3 else None  # of the last block only the class token is computed
        out = vit.stage(number, tokens, keys)
        for attends in (0, 1):
            normed = block.norm1(x)
            middle = x[:, :queries] + attends * block.attn(normed[:, :queries], normed) / (1 - rate)
            for thinks in (0, 1):
                expected = middle + thinks * block.mlp(block.norm2(middle)) / (1 - rate)
                shares[attends, thinks] = (np.abs(out - expected).max(axis=(1, 2)) < 1e-5).mean()
        assert sum(shares.values()) == 1
        for (attends, thinks), share in shares.items():
            stay, skip = 1 - rate, rate
            chance = (stay if attends else skip) * (stay if thinks else skip)
            assert share == pytest.approx(chance, abs=4 * (chance * (1 - chance) / count) ** 0.5)


def test_skipping_keeps_the_mean_and_follows_the_key_of_the_image_alone():
    branch, keys = jax.random.normal(SEED, (4000, 3, 2)), jax.random.split(SEED, 4000)
    out = drop_path(jnp.ones_like(branch), 0.3, keys, 3)
    assert out.mean() == pytest.approx(1, abs=0.05) and np.allclose(out[out != 0], 1 / 0.7)
    order = jnp.arange(4000)[::-7]
    some = drop_path(branch[order], 0.3, keys[order], 3)
    np.testing.assert_array_equal(some, drop_path(branch, 0.3, keys, 3)[order])
    assert drop_path(branch, 0.3, None, 3) is branch and drop_path(branch, 0.0, keys, 3) is branch


def test_nothing_of_it_is_in_the_program_of_a_model_without_it():
    keys, images = jax.random.split(SEED, 2), jnp.zeros((2, 16, 16, 3))

    def program(**options):
        model = describe(SHAPE, 4, **options)
        return model.jit(model.logits).lower(model.shapes, images, keys).as_text()

    plain = program()
    assert "shift_left" not in plain and "shift_left" in program(drop_path=0.1)  # of random bits
    assert plain == program(drop_path=0.0, head_stddev=0.1, lora=Lora(rank=0, alpha=8, targets="query"))


def test_the_classifier_is_zero_or_drawn_as_wide_as_asked_and_all_else_is_the_same():
    zero, drawn = (describe(SHAPE, 500, head_stddev=stddev).initial_params(seed=3) for stddev in (0.0, 0.02))
    kernel = drawn.pop("classifier/kernel")
    assert not zero.pop("classifier/kernel").any()
    assert kernel.std() == pytest.approx(0.02, rel=0.05) and abs(kernel.mean()) < 1e-3
    assert all(np.array_equal(drawn[path], zero[path]) for path in zero) and drawn.keys() == zero.keys()


def test_some_parameters_are_drawn_as_they_are_among_all():
    model = describe(SHAPE, 5, head_stddev=0.1)
    everything, few = model.initial_params(3), ["classifier/kernel", "cls_token"]
    most = [path for path in model.shapes if path not in few]
    for paths in (few, most):
        drawn = model.initial_params(3, paths)
        assert list(drawn) == paths
        assert all(np.allclose(drawn[path], everything[path], rtol=1e-6, atol=0) for path in paths)


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


@pytest.mark.parametrize("attention", [cpu.attention, xla_attention, cudnn_attention])
def test_attention_is_that_of_jax(attention):
    tokens = 1 if attention is cudnn_attention else 7  # as in the last block; more need cuDNN
    key, value = jax.random.normal(jax.random.key(0), (2, 2, 7, 3, 8))
    query = jax.random.normal(jax.random.key(1), (2, tokens, 3, 8))

    def gradients(attend):
        return jax.grad(lambda *arrays: (attend(*arrays) * jnp.arange(8)).sum(), (0, 1, 2))(query, key, value)

    ours = gradients(functools.partial(attention, num_tokens=7))
    reference = gradients(jax.nn.dot_product_attention)
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_platform_sets_barriers_and_compiler_options():
    def program(platform):
        model = describe(SHAPE, 4, device=types.SimpleNamespace(platform=platform))
        return model, model.jit(model.logits).lower(model.shapes, jnp.zeros((2, 16, 16, 3))).as_text()

    (cpu, cpu_text), (tpu, tpu_text) = program("cpu"), program("tpu")
    assert cpu_text.count("optimization_barrier") == 2 * SHAPE["num_layers"] and "optimization_barrier" not in tpu_text
    assert cpu.kernels.compiler_options and tpu.kernels == PORTABLE
    assert cpu.shapes == tpu.shapes and cpu.graphdef != tpu.graphdef
    again = describe(SHAPE, 4).graphdef
    assert again == cpu.graphdef and hash(again) == hash(cpu.graphdef)


@pytest.mark.parametrize(
    "variant, tolerance",
    [({}, 1e-5), ({"pool": "cls+mean", "num_registers": 2}, 1e-5), ({"dtype": jnp.bfloat16}, 2e-2)],
)
def test_tokens_added_to_make_their_number_even_change_nothing(variant, tolerance):
    """The model has an odd number of them, which cuDNN's attention does not take."""
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    def logits_and_gradients(kernels):
        vit = VisionTransformer(num_classes=4, **SHAPE, **variant, kernels=kernels, rngs=nnx.Rngs(0))
        vit.classifier.kernel[...] = jax.random.normal(jax.random.key(2), vit.classifier.kernel.shape)
        assert vit.num_tokens % 2 == 1 and vit.stage(0, images).shape[1] % kernels.token_multiple == 0
        graphdef, params = nnx.split(vit)
        logits = jax.jit(lambda params: nnx.merge(graphdef, params)(images))
        return logits(params), jax.grad(lambda params: (logits(params) ** 2).mean())(params)

    plain, padded = (logits_and_gradients(Kernels(token_multiple=n)) for n in (1, 2))
    size = max(np.abs(gradient).max() for gradient in jax.tree.leaves(plain[1]))
    np.testing.assert_allclose(plain[0], padded[0], atol=tolerance * np.abs(plain[0]).max())
    for a, b in zip(*(jax.tree.leaves(gradients) for _, gradients in (plain, padded)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * size)


def test_attention_with_dropout_is_not_left_to_cudnn_and_the_log_says_so(caplog):
    gpu = types.SimpleNamespace(platform="gpu")
    with caplog.at_level("INFO", logger="vit_nabirds"):
        model = describe(SHAPE, 4, "bfloat16", dropout_rate=0.1, device=gpu)
    assert model.kernels.attention is xla_attention and model.kernels.token_multiple == 1
    assert "attention is computed by XLA, not by cuDNN: model.dropout_rate is not 0" in caplog.text
