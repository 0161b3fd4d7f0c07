"""The Vision Transformer in Flax NNX: ViT (Dosovitskiy et al., 2021) and DINOv2 (Oquab et al., 2024), with or without
registers (Darcet et al., 2024). One definition; its arguments are the differences."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vit_nabirds.config.fields import Lora
from vit_nabirds.models.kernels import PORTABLE, Kernels

NO_LORA = Lora(rank=0)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact function, Hugging Face's "gelu"; `nnx.gelu` defaults to the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_gradient(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # Without the barrier XLA keeps erf(x) of the forward pass for this; reading it is slower than computing it again.
    x = jax.lax.optimization_barrier(x)
    cdf, density = 0.5 * jax.lax.erfc(-x * 0.5**0.5), jnp.exp(-0.5 * x * x) * (0.5 / math.pi) ** 0.5
    return (gradient * (cdf + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


def swiglu(x: jax.Array) -> jax.Array:
    """silu(gate) * value (Shazeer, 2020): (..., 2 n) -> (..., n)."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


def fold(keys: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """A new key for each example: keys (batch,) -> (batch,). None, for no dropout, stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """x (batch, ...) with a share of it set to 0, drawn for each example by its own key; without keys x itself."""
    if keys is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def drop_path(branch: jax.Array, rate: float, keys: jax.Array | None, number: int) -> jax.Array:
    """A branch (batch, tokens, hidden_size), with 0 for the share of the images that skip it and the others scaled up.

    Each image draws by its own key, in which `number` is folded (stochastic depth: Huang et al., 2016).
    """
    if keys is None or not rate:
        return branch
    stays = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(fold(keys, number))
    return jnp.where(stays[:, None, None], branch / (1 - rate), 0)


class LowRank(nnx.LoRA):
    """alpha / rank * x A B beside a layer, with the axes of its input and output (LoRA: Hu et al., 2022)."""

    def __init__(self, layer: nnx.Linear | nnx.LinearGeneral, lora: Lora, rngs: nnx.Rngs):
        kernel = layer.kernel.shape
        self.axes, self.shape = np.size(layer.in_features), kernel[np.size(layer.in_features) :]
        sizes = math.prod(kernel[: self.axes]), lora.rank, math.prod(self.shape)
        # A as loralib and PEFT draw it, so that learning rates found with them serve here; B is zero.
        draw = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        super().__init__(*sizes, dtype=layer.dtype, a_initializer=draw, lora_param_type=nnx.Param, rngs=rngs)
        self.scale = lora.alpha / lora.rank

    def __call__(self, x: jax.Array) -> jax.Array:
        batch = x.shape[: x.ndim - self.axes]
        return self.scale * super().__call__(x.reshape(*batch, -1)).reshape(*batch, *self.shape)


class Linear(nnx.Linear):
    """With a low-rank change of its kernel where it is given one."""

    lora = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) if self.lora is None else super().__call__(x) + self.lora(x)


class LinearGeneral(nnx.LinearGeneral):
    """With a low-rank change of its kernel where it is given one."""

    lora = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) if self.lora is None else super().__call__(x) + self.lora(x)


class Attention(nnx.Module):
    """Multi-head attention of `queries` to `x`, both (batch, tokens, hidden_size), of which `num_tokens` count."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_tokens: int,
        dropout_rate: float,
        *,
        qkv_bias: bool,
        dtype: jnp.dtype,
        kernels: Kernels,
        rngs: nnx.Rngs,
    ):
        heads = (num_heads, hidden_size // num_heads)
        options = dict(dtype=dtype, rngs=rngs)
        self.query = LinearGeneral(hidden_size, heads, use_bias=qkv_bias, **options)
        self.key = LinearGeneral(hidden_size, heads, use_bias=qkv_bias, **options)
        self.value = LinearGeneral(hidden_size, heads, use_bias=qkv_bias, **options)
        self.out = LinearGeneral(heads, hidden_size, axis=(-2, -1), **options)
        self.num_tokens, self.dropout_rate, self.kernels = num_tokens, dropout_rate, kernels

    def __call__(self, queries: jax.Array, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        query, key, value = self.query(queries), self.key(x), self.value(x)
        if keys is None or not self.dropout_rate:
            return self.out(self.kernels.attention(query, key, value, self.num_tokens))
        counts = jnp.arange(key.shape[1]) < self.num_tokens
        attend = functools.partial(
            nnx.dot_product_attention, mask=counts, dropout_rate=self.dropout_rate, broadcast_dropout=False
        )
        return self.out(jax.vmap(lambda q, k, v, rng: attend(q, k, v, dropout_rng=rng))(query, key, value, keys))


class TransformerEncoder(nnx.Module):
    """One pre-norm block: (batch, tokens, hidden_size) -> the same shape.

    `layer_scale` multiplies each branch by a learnt vector; `gated` makes the MLP a SwiGLU of width mlp_dim; a share
    `drop_path` of the images skips each branch.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp_dim: int,
        num_heads: int,
        num_tokens: int,
        dropout_rate: float = 0.0,
        *,
        layer_norm_eps: float = 1e-12,
        qkv_bias: bool = True,
        layer_scale: bool = False,
        gated: bool = False,
        drop_path: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        kernels: Kernels = PORTABLE,
        rngs: nnx.Rngs,
    ):
        self.norm1 = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        options = dict(qkv_bias=qkv_bias, dtype=dtype, kernels=kernels, rngs=rngs)
        self.attn = Attention(hidden_size, num_heads, num_tokens, dropout_rate, **options)
        self.norm2 = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = nnx.Sequential(
            Linear(hidden_size, 2 * mlp_dim if gated else mlp_dim, dtype=dtype, rngs=rngs),
            swiglu if gated else gelu,
            Linear(mlp_dim, hidden_size, dtype=dtype, rngs=rngs),
        )
        self.scale1 = nnx.Param(jnp.ones(hidden_size)) if layer_scale else None
        self.scale2 = nnx.Param(jnp.ones(hidden_size)) if layer_scale else None
        self.dropout_rate, self.drop_path, self.kernels = dropout_rate, drop_path, kernels

    def __call__(self, x: jax.Array, tokens: int | None = None, keys: jax.Array | None = None) -> jax.Array:
        """With `tokens`, compute only the first so many, which attend to all: (batch, tokens, hidden_size)."""

        def add(x: jax.Array, branch: jax.Array, scale: nnx.Param | None, number: int) -> jax.Array:
            branch = branch if scale is None else branch * scale[...].astype(branch.dtype)
            branch = dropout(branch, self.dropout_rate, fold(keys, number))
            return self.kernels.keep(x + drop_path(branch, self.drop_path, keys, number + 2))

        normed = self.norm1(x)
        x = add(x[:, :tokens], self.attn(normed[:, :tokens], normed, fold(keys, 0)), self.scale1, 1)
        return add(x, self.mlp(self.norm2(x)), self.scale2, 2)


class VisionTransformer(nnx.Module):
    """Normalised images (batch, image_size, image_size, in_channels) -> float32 logits (batch, num_classes).

    Its only state are float32 parameters. The call brings a key for each image, for what is dropped; without keys
    nothing is. The rate of `drop_path` rises evenly from 0 at the first block. The classifier sees the class token
    (`pool` 'cls'), or the class token and the mean of the patches ('cls+mean'); its weights are drawn with the
    standard deviation `head_stddev`. `lora` says which layers of the blocks have low-rank changes.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        hidden_size: int = 768,
        dropout_rate: float = 0.0,
        *,
        layer_norm_eps: float = 1e-12,
        qkv_bias: bool = True,
        layer_scale: bool = False,
        gated: bool = False,
        num_registers: int = 0,
        pool: str = "cls",
        drop_path: float = 0.0,
        head_stddev: float = 0.0,
        lora: Lora = NO_LORA,
        dtype: jnp.dtype = jnp.float32,
        kernels: Kernels = PORTABLE,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size or hidden_size % num_heads:
            text = "image_size {} must be a multiple of patch_size {}, and hidden_size {} of num_heads {}"
            raise ValueError(text.format(image_size, patch_size, hidden_size, num_heads))
        num_patches = (image_size // patch_size) ** 2
        self.patch_size = patch_size
        self.patch_embeddings = nnx.Linear(patch_size**2 * in_channels, hidden_size, dtype=dtype, rngs=rngs)
        init = nnx.initializers.truncated_normal(stddev=0.02)
        self.position_embeddings = nnx.Param(init(rngs.params(), (1, num_patches + 1, hidden_size), jnp.float32))
        self.cls_token = nnx.Param(jnp.zeros((1, 1, hidden_size)))
        self.registers = nnx.Param(init(rngs.params(), (1, num_registers, hidden_size))) if num_registers else None
        self.num_tokens = 1 + num_registers + num_patches
        block = dict(layer_norm_eps=layer_norm_eps, dtype=dtype, kernels=kernels, rngs=rngs)
        block |= dict(qkv_bias=qkv_bias, layer_scale=layer_scale, gated=gated)
        shape = (hidden_size, mlp_dim, num_heads, self.num_tokens, dropout_rate)
        rates = [drop_path * i / max(num_layers - 1, 1) for i in range(num_layers)]
        self.encoder = nnx.Sequential(*[TransformerEncoder(*shape, **block, drop_path=rate) for rate in rates])
        self.final_norm = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        # In float32, because the loss is computed on its logits; zero, so that a new head does not disturb the rest,
        # unless asked otherwise.
        width = hidden_size if pool == "cls" else 2 * hidden_size
        draw = nnx.initializers.normal(head_stddev) if head_stddev else nnx.initializers.zeros
        self.classifier = nnx.Linear(width, num_classes, kernel_init=draw, rngs=rngs)
        self.num_registers, self.pool, self.dtype = num_registers, pool, dtype
        self.dropout_rate, self.kernels = dropout_rate, kernels
        for path, layer in list(nnx.iter_modules(self)) if lora.rank else ():  # last: all other draws stay as they were
            if isinstance(layer, Linear | LinearGeneral) and re.search(lora.targets, "/".join(map(str, path))):
                layer.lora = LowRank(layer, lora, rngs)

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        return self.classifier(self.features(images, keys))

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """What the classifier sees: float32 (batch, hidden_size), or (batch, 2 hidden_size) for pool 'cls+mean'."""
        x = images
        for number in range(len(self.encoder.layers) + 1):
            x = self.stage(number, x, keys)
        return self.pooled(x)

    def stage(self, number: int, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """A part of the call: 0 makes tokens of images, then each block is one, and the last makes logits of tokens."""
        keys, last = fold(keys, number), len(self.encoder.layers)
        if number == 0:
            x = dropout(self.embed(x), self.dropout_rate, keys)
            # Once for all blocks, whose attention does not look at what is added.
            return jnp.pad(x, ((0, 0), (0, -self.num_tokens % self.kernels.token_multiple), (0, 0)))
        if number <= last:  # of the last block's output, pool 'cls' needs the class token only
            return self.encoder.layers[number - 1](x, 1 if number == last and self.pool == "cls" else None, keys)
        return self.classifier(self.pooled(x))

    def pooled(self, x: jax.Array) -> jax.Array:
        """Features of the last block's tokens."""
        if self.pool == "cls":
            return self.final_norm(x[:, 0]).astype(jnp.float32)
        x = self.final_norm(x[:, : self.num_tokens]).astype(jnp.float32)
        return jnp.concatenate([x[:, 0], x[:, 1 + self.num_registers :].mean(axis=1)], axis=1)

    def embed(self, images: jax.Array) -> jax.Array:
        """Tokens of the class, the registers and the patches: (batch, tokens, hidden_size)."""
        (batch, height, width, channels), size = images.shape, self.patch_size
        patches = images.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
        patches = self.patch_embeddings(patches.reshape(batch, -1, size * size * channels))
        hidden_size = patches.shape[-1]
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (batch, 1, hidden_size))
        x = jnp.concatenate([cls_token, patches], axis=1) + self.position_embeddings[...].astype(self.dtype)
        if self.num_registers:  # registers have no position
            shape = (batch, self.num_registers, hidden_size)
            registers = jnp.broadcast_to(self.registers[...].astype(self.dtype), shape)
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        return x
