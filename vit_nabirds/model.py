"""The Vision Transformer (Dosovitskiy et al., 2021) in Flax NNX."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

# Hugging Face's "gelu" is the exact one; `nnx.gelu` would be the tanh approximation.
gelu = functools.partial(jax.nn.gelu, approximate=False)


class TransformerEncoder(nnx.Module):
    """One pre-norm block: (batch, tokens, hidden_size) -> the same shape."""

    def __init__(
        self,
        hidden_size: int,
        mlp_dim: int,
        num_heads: int,
        dropout_rate: float = 0.0,
        *,
        layer_norm_eps: float = 1e-12,
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
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(hidden_size, mlp_dim, dtype=dtype, rngs=rngs),
            gelu,
            nnx.Linear(mlp_dim, hidden_size, dtype=dtype, rngs=rngs),
        )
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        def drop(branch: jax.Array) -> jax.Array:
            return self.dropout(branch, deterministic=rngs is None, rngs=rngs)

        x = x + drop(self.attn(self.norm1(x), deterministic=rngs is None, rngs=rngs))
        return x + drop(self.mlp(self.norm2(x)))


class VisionTransformer(nnx.Module):
    """Images (batch, img_size, img_size, in_channels), normalised -> logits (batch, num_classes), float32.

    Parameters are float32 and the only state of the module: randomness for dropout comes with the call, as
    `model(images, rngs=nnx.Rngs(dropout=key))`; without it nothing is dropped.
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
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if img_size % patch_size or hidden_size % num_heads:
            raise ValueError(
                f"img_size {img_size} must be a multiple of patch_size {patch_size}, "
                f"and hidden_size {hidden_size} of num_heads {num_heads}"
            )
        num_patches = (img_size // patch_size) ** 2
        self.patch_embeddings = nnx.Conv(
            in_channels,
            hidden_size,
            kernel_size=(patch_size, patch_size),
            strides=(patch_size, patch_size),
            padding="VALID",
            dtype=dtype,
            rngs=rngs,
        )
        init = nnx.initializers.truncated_normal(stddev=0.02)
        self.position_embeddings = nnx.Param(init(rngs.params(), (1, num_patches + 1, hidden_size), jnp.float32))
        self.cls_token = nnx.Param(jnp.zeros((1, 1, hidden_size)))
        self.dropout = nnx.Dropout(dropout_rate)
        self.encoder = nnx.Sequential(
            *[
                TransformerEncoder(
                    hidden_size, mlp_dim, num_heads, dropout_rate, layer_norm_eps=layer_norm_eps, dtype=dtype, rngs=rngs
                )
                for _ in range(num_layers)
            ]
        )
        self.final_norm = nnx.LayerNorm(hidden_size, epsilon=layer_norm_eps, dtype=dtype, rngs=rngs)
        # float32, for the loss is computed on its logits; from zero, so that a new head does not disturb the rest
        self.classifier = nnx.Linear(hidden_size, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        patches = self.patch_embeddings(images)
        batch, height, width, hidden_size = patches.shape
        patches = patches.reshape(batch, height * width, hidden_size)
        cls_token = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (batch, 1, hidden_size))
        x = jnp.concatenate([cls_token, patches], axis=1) + self.position_embeddings[...].astype(self.dtype)
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        x = self.encoder(x, rngs=rngs)
        return self.classifier(self.final_norm(x[:, 0]).astype(jnp.float32))


def flat_params(model: nnx.Module) -> dict[str, jax.Array]:
    """The model's parameters by path, e.g. 'encoder/layers/0/attn/query/kernel'.

    A flat dict of arrays is what the optimizer, the checkpoints and the compiled step work on: JAX flattens it in
    C++ at every step, where the module graph or an `nnx.State` would be walked in Python.
    """
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def describe(
    architecture: dict, num_classes: int, compute_dtype: str = "float32", dropout_rate: float = 0.0
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """The structure of a model and the shapes of its parameters by path; nothing is computed."""
    model = nnx.eval_shape(
        lambda: VisionTransformer(
            **architecture,
            num_classes=num_classes,
            dropout_rate=dropout_rate,
            dtype=jnp.dtype(compute_dtype),
            rngs=nnx.Rngs(0),
        )
    )
    return nnx.graphdef(model), flat_params(model)


def initial_params(architecture: dict, num_classes: int, seed: int) -> dict[str, jax.Array]:
    """Random parameters by path."""
    return flat_params(VisionTransformer(**architecture, num_classes=num_classes, rngs=nnx.Rngs(seed)))


def apply(graphdef: nnx.GraphDef, params: dict, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Logits of the model that `graphdef` describes, with these parameters."""
    flat = {tuple(int(p) if p.isdigit() else p for p in path.split("/")): nnx.Param(x) for path, x in params.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))(images, rngs=rngs)
