"""The Vision Transformer in Flax NNX: ViT (Dosovitskiy et al., 2021) and DINOv2 (Oquab et al., 2024), with or without
registers (Darcet et al., 2024). One definition; its arguments are the differences."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from vit_nabirds.models.kernels import PORTABLE, Kernels


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
        self.query = nnx.LinearGeneral(hidden_size, heads, use_bias=qkv_bias, **options)
        self.key = nnx.LinearGeneral(hidden_size, heads, use_bias=qkv_bias, **options)
        self.value = nnx.LinearGeneral(hidden_size, heads, use_bias=qkv_bias, **options)
        self.out = nnx.LinearGeneral(heads, hidden_size, axis=(-2, -1), **options)
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

    `layer_scale` multiplies each branch by a learnt vector; `gated` makes the MLP a SwiGLU of width mlp_dim.
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
        dtype: jnp.dtype = jnp.float32,
        kernels: Kernels = PORTABLE,
        rngs: nnx.Rngs,
    ):
        self.norm1 = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        options = dict(qkv_bias=qkv_bias, dtype=dtype, kernels=kernels, rngs=rngs)
        self.attn = Attention(hidden_size, num_heads, num_tokens, dropout_rate, **options)
        self.norm2 = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(hidden_size, 2 * mlp_dim if gated else mlp_dim, dtype=dtype, rngs=rngs),
            swiglu if gated else gelu,
            nnx.Linear(mlp_dim, hidden_size, dtype=dtype, rngs=rngs),
        )
        self.scale1 = nnx.Param(jnp.ones(hidden_size)) if layer_scale else None
        self.scale2 = nnx.Param(jnp.ones(hidden_size)) if layer_scale else None
        self.dropout_rate, self.kernels = dropout_rate, kernels

    def __call__(self, x: jax.Array, tokens: int | None = None, keys: jax.Array | None = None) -> jax.Array:
        """With `tokens`, compute only the first so many, which attend to all: (batch, tokens, hidden_size)."""

        def add(x: jax.Array, branch: jax.Array, scale: nnx.Param | None, number: int) -> jax.Array:
            branch = branch if scale is None else branch * scale[...].astype(branch.dtype)
            return self.kernels.keep(x + dropout(branch, self.dropout_rate, fold(keys, number)))

        normed = self.norm1(x)
        x = add(x[:, :tokens], self.attn(normed[:, :tokens], normed, fold(keys, 0)), self.scale1, 1)
        return add(x, self.mlp(self.norm2(x)), self.scale2, 2)


class VisionTransformer(nnx.Module):
    """Normalised images (batch, image_size, image_size, in_channels) -> float32 logits (batch, num_classes).

    Its only state are float32 parameters. The call brings a key for each image, for dropout; without keys nothing is
    dropped. The classifier sees the class token (`pool` 'cls'), or the class token and the mean of the patches
    ('cls+mean').
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
        self.encoder = nnx.Sequential(*[TransformerEncoder(*shape, **block) for _ in range(num_layers)])
        self.final_norm = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        # In float32, because the loss is computed on its logits; zero, so that a new head does not disturb the rest.
        width = hidden_size if pool == "cls" else 2 * hidden_size
        self.classifier = nnx.Linear(width, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.num_registers, self.pool, self.dtype = num_registers, pool, dtype
        self.dropout_rate, self.kernels = dropout_rate, kernels

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
