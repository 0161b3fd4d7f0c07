"""A transformer's structure, apart from its parameters, which are a flat dict of arrays by path."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vit_nabirds.models.kernels import Kernels, kernels_for
from vit_nabirds.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer without its parameters: structure, shapes of the parameters by path, and how it is compiled."""

    architecture: dict  # arguments of VisionTransformer
    num_classes: int
    graphdef: nnx.GraphDef
    shapes: dict[str, jax.ShapeDtypeStruct]  # by path, e.g. 'encoder/layers/0/attn/query/kernel'
    kernels: Kernels

    def bind(self, params: dict[str, jax.Array]) -> VisionTransformer:
        """The module with these parameters."""
        flat = {tuple(int(p) if p.isdigit() else p for p in path.split("/")): x for path, x in params.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state({path: nnx.Param(x) for path, x in flat.items()}))

    def logits(self, params: dict[str, jax.Array], images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """float32 (batch, num_classes) of normalised images (batch, image_size, image_size, channels)."""
        return self.bind(params)(images, rngs=rngs)

    def initial_params(self, seed: int) -> dict[str, jax.Array]:
        """Random float32 parameters by path. Can be traced under jit."""
        return _by_path(VisionTransformer(**self.architecture, num_classes=self.num_classes, rngs=nnx.Rngs(seed)))

    def jit(self, function: Callable, **options) -> Callable:
        """`jax.jit` for a function that runs the model, with the platform's compiler options."""
        return jax.jit(function, compiler_options=dict(self.kernels.compiler_options) or None, **options)


def describe(
    architecture: dict,
    num_classes: int,
    compute_dtype: str = "float32",
    dropout_rate: float = 0.0,
    remat: bool = False,
    platform: str | None = None,
) -> Model:
    """The model of an architecture for a platform (default: JAX's default backend). Computes nothing."""
    kernels = kernels_for(platform or jax.default_backend())
    module = nnx.eval_shape(
        lambda: VisionTransformer(
            **architecture,
            num_classes=num_classes,
            dropout_rate=dropout_rate,
            remat=remat,
            dtype=jnp.dtype(compute_dtype),
            kernels=kernels,
            rngs=nnx.Rngs(0),
        )
    )
    return Model(dict(architecture), num_classes, nnx.graphdef(module), _by_path(module), kernels)


def _by_path(module: nnx.Module) -> dict[str, jax.Array]:
    """A flat dict, which JAX flattens in C++ at every step; it would walk an `nnx.State` in Python."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat}
