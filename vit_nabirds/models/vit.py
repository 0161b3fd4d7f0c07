"""The Vision Transformer in Flax NNX: ViT (Dosovitskiy et al., 2021) and DINOv2 (Oquab et al., 2024), with or without
registers (Darcet et al., 2024): one definition, whose arguments are the differences."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact one, as Hugging Face's "gelu"; `nnx.gelu` would be the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_gradient(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # Left alone, XLA keeps erf(x) for this from the forward pass: as large as x, and read slower than made again.
    x = jax.lax.optimization_barrier(x)
    cdf, density = 0.5 * jax.lax.erfc(-x * 0.5**0.5), jnp.exp(-0.5 * x * x) * (0.5 / math.pi) ** 0.5
    return (gradient * (cdf + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


def swiglu(x: jax.Array) -> jax.Array:
    """(..., 2 n) -> (..., n), gated (Shazeer, 2020)."""
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


def attention(query: jax.Array, key: jax.Array, value: jax.Array, **options) -> jax.Array:
    """softmax(query keyᵀ / √width) value; each is (batch, tokens, heads, width). The fastest form of the platform."""
    if options["dropout_rate"] and not options["deterministic"]:
        return nnx.dot_product_attention(query, key, value, **options)
    if jax.default_backend() != "cpu":
        whole = query.shape == key.shape and _has_flash_attention(query.dtype, query.shape[-1])
        implementation = "cudnn" if whole else "xla"
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    # XLA's CPU backend multiplies plain batches of matrices 1.5 to 4 times as fast as it contracts (b, t, h, w).
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.swapaxes(2, 3)
    return (jax.nn.softmax(scores) @ value).swapaxes(1, 2)


@functools.cache
def _has_flash_attention(dtype: jnp.dtype, width: int) -> bool:
    """Whether cuDNN's attention compiles here, forwards and backwards: in bfloat16, on GPUs since Ampere."""
    x = jax.ShapeDtypeStruct((1, 17, 2, width), dtype)

    def total(x: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(x, x, x, implementation="cudnn").sum(dtype=jnp.float32)

    try:
        jax.jit(jax.grad(total)).lower(x).compile()
    except Exception:  # noqa: BLE001, for each kind of "no" is an error of its own
        return False
    return True


def materialised(x: jax.Array) -> jax.Array:
    """x; on a CPU it is written to memory, where XLA would add up all residuals again in each later fusion."""
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x


def jit(function: Callable, **options) -> Callable:
    """`jax.jit` for what runs the model."""
    if jax.default_backend() == "cpu":
        # Barriers then hold until the end of XLA's CPU pipeline: 3.0 images/s instead of 1.9 in training (ViT-S/16),
        # compiled in a quarter of the time.
        options["compiler_options"] = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return jax.jit(function, **options)


class TransformerEncoder(nnx.Module):
    """One pre-norm block: (batch, tokens, hidden_size) -> the same shape.

    `layer_scale`: each branch is multiplied by a learnt vector. `gated`: the MLP is SwiGLU of width mlp_dim.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp_dim: int,
        num_heads: int,
        dropout_rate: float = 0.0,
        *,
        layer_norm_eps: float = 1e-12,
        qkv_bias: bool = True,
        layer_scale: bool = False,
        gated: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm1 = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            num_heads=num_heads,
            in_features=hidden_size,
            dropout_rate=dropout_rate,
            broadcast_dropout=False,
            decode=False,
            dtype=dtype,
            keep_rngs=False,
            attention_fn=attention,
            rngs=rngs,
        )
        if not qkv_bias:
            self.attn.query.bias = self.attn.key.bias = self.attn.value.bias = None
        self.norm2 = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(hidden_size, 2 * mlp_dim if gated else mlp_dim, dtype=dtype, rngs=rngs),
            swiglu if gated else gelu,
            nnx.Linear(mlp_dim, hidden_size, dtype=dtype, rngs=rngs),
        )
        self.scale1 = nnx.Param(jnp.ones(hidden_size)) if layer_scale else None
        self.scale2 = nnx.Param(jnp.ones(hidden_size)) if layer_scale else None
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(self, x: jax.Array, tokens: int | None = None, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """With `tokens`, only the first so many are computed, from all of them: (batch, tokens, hidden_size)."""

        def finish(branch: jax.Array, scale: nnx.Param | None) -> jax.Array:
            branch = branch if scale is None else branch * scale[...].astype(branch.dtype)
            return self.dropout(branch, deterministic=rngs is None, rngs=rngs)

        seen = self.norm1(x)
        attended = self.attn(seen[:, :tokens], seen, deterministic=rngs is None, rngs=rngs)
        x = materialised(x[:, :tokens] + finish(attended, self.scale1))
        return materialised(x + finish(self.mlp(self.norm2(x)), self.scale2))


class VisionTransformer(nnx.Module):
    """Images (batch, img_size, img_size, in_channels), normalised -> logits (batch, num_classes), float32.

    Parameters are float32 and the only state of the module: randomness for dropout comes with the call, as
    `model(images, rngs=nnx.Rngs(dropout=key))`; without it nothing is dropped. `pool` is what the classifier sees:
    'cls', the class token, or 'cls+mean', with the mean of the patches beside it.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
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
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if img_size % patch_size or hidden_size % num_heads:
            raise ValueError(
                f"img_size {img_size} must be a multiple of patch_size {patch_size}, "
                f"and hidden_size {hidden_size} of num_heads {num_heads}"
            )
        num_patches = (img_size // patch_size) ** 2
        self.patch_size = patch_size
        self.patch_embeddings = nnx.Linear(patch_size**2 * in_channels, hidden_size, dtype=dtype, rngs=rngs)
        init = nnx.initializers.truncated_normal(stddev=0.02)
        self.position_embeddings = nnx.Param(init(rngs.params(), (1, num_patches + 1, hidden_size), jnp.float32))
        self.cls_token = nnx.Param(jnp.zeros((1, 1, hidden_size)))
        self.registers = nnx.Param(init(rngs.params(), (1, num_registers, hidden_size))) if num_registers else None
        self.dropout = nnx.Dropout(dropout_rate)
        self.encoder = nnx.Sequential(
            *[
                TransformerEncoder(
                    hidden_size,
                    mlp_dim,
                    num_heads,
                    dropout_rate,
                    layer_norm_eps=layer_norm_eps,
                    qkv_bias=qkv_bias,
                    layer_scale=layer_scale,
                    gated=gated,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(num_layers)
            ]
        )
        self.final_norm = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        # float32, for the loss is computed on its logits; from zero, so that a new head does not disturb the rest
        width = hidden_size if pool == "cls" else 2 * hidden_size
        self.classifier = nnx.Linear(width, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.num_registers, self.pool, self.remat, self.dtype = num_registers, pool, remat, dtype

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.classifier(self.features(images, rngs=rngs))

    def features(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """What the classifier sees: float32 (batch, hidden_size), or twice as wide with the mean of the patches."""
        (batch, height, width, channels), size = images.shape, self.patch_size
        patches = images.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
        patches = self.patch_embeddings(patches.reshape(batch, -1, size * size * channels))
        hidden_size = patches.shape[-1]
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (batch, 1, hidden_size))
        x = jnp.concatenate([cls_token, patches], axis=1) + self.position_embeddings[...].astype(self.dtype)
        if self.num_registers:  # they have no position
            registers = jnp.broadcast_to(
                self.registers[...].astype(self.dtype), (batch, self.num_registers, hidden_size)
            )
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)

        def run(block: TransformerEncoder, x: jax.Array, tokens: int | None, rngs: nnx.Rngs | None) -> jax.Array:
            return block(x, tokens, rngs=rngs)

        if self.remat:
            run = nnx.remat(run, static_argnums=2)
        *blocks, last = self.encoder.layers
        for block in blocks:
            x = run(block, x, None, rngs)
        # of the last block the classifier sees the class token alone, or all
        x = run(last, x, 1 if self.pool == "cls" else None, rngs)
        if self.pool == "cls":
            return self.final_norm(x[:, 0]).astype(jnp.float32)
        x = self.final_norm(x).astype(jnp.float32)
        return jnp.concatenate([x[:, 0], x[:, 1 + self.num_registers :].mean(axis=1)], axis=1)


def flat_params(model: nnx.Module) -> dict[str, jax.Array]:
    """The model's parameters by path, e.g. 'encoder/layers/0/attn/query/kernel'.

    A flat dict of arrays is what the optimizer, the checkpoints and the compiled step work on: JAX flattens it in
    C++ at every step, where the module graph or an `nnx.State` would be walked in Python.
    """
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def describe(
    architecture: dict,
    num_classes: int,
    compute_dtype: str = "float32",
    dropout_rate: float = 0.0,
    remat: bool = False,
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """The structure of a model and the shapes of its parameters by path; nothing is computed."""
    model = nnx.eval_shape(
        lambda: VisionTransformer(
            **architecture,
            num_classes=num_classes,
            dropout_rate=dropout_rate,
            remat=remat,
            dtype=jnp.dtype(compute_dtype),
            rngs=nnx.Rngs(0),
        )
    )
    return nnx.graphdef(model), flat_params(model)


def initial_params(architecture: dict, num_classes: int, seed: int) -> dict[str, jax.Array]:
    """Random parameters by path."""
    return flat_params(VisionTransformer(**architecture, num_classes=num_classes, rngs=nnx.Rngs(seed)))


def bind(graphdef: nnx.GraphDef, params: dict) -> VisionTransformer:
    """The model that `graphdef` describes, with these parameters."""
    flat = {tuple(int(p) if p.isdigit() else p for p in path.split("/")): nnx.Param(x) for path, x in params.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def apply(graphdef: nnx.GraphDef, params: dict, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Logits of the model that `graphdef` describes, with these parameters."""
    return bind(graphdef, params)(images, rngs=rngs)
