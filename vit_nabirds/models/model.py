"""A transformer's structure, apart from its parameters, which are a flat dict of arrays by path."""

import dataclasses
import re
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
    remat: bool  # blocks are computed again in the backward pass

    @property
    def num_stages(self) -> int:
        """Tokens, each block, classifier: the parts of the computation, of which each takes the result of the last."""
        return self.architecture["num_layers"] + 2

    def stage_of(self, path: str) -> int:
        """The stage that a parameter belongs to."""
        if block := re.match(r"encoder/layers/(\d+)/", path):
            return 1 + int(block[1])
        return self.num_stages - 1 if path.startswith(("final_norm/", "classifier/")) else 0

    def computes_again(self, number: int) -> bool:
        """Whether the backward pass computes this stage again, which saves the memory of what is in between."""
        return self.remat and 0 < number < self.num_stages - 1

    def stage(self, number: int, params: dict, keys: jax.Array | None, own: dict, x: jax.Array) -> jax.Array:
        """One stage, with `own` in place of those of all parameters."""
        return self.bind(params | own).stage(number, x, keys)

    def bind(self, params: dict[str, jax.Array]) -> VisionTransformer:
        """The module with these parameters."""
        flat = {tuple(int(p) if p.isdigit() else p for p in path.split("/")): x for path, x in params.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state({path: nnx.Param(x) for path, x in flat.items()}))

    def logits(self, params: dict[str, jax.Array], images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """float32 (batch, num_classes) of normalised images (batch, image_size, image_size, channels).

        With a key for each image, activations are dropped.
        """
        return self.bind(params)(images, keys)

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
    device: jax.Device | None = None,
) -> Model:
    """The model of an architecture for a device (default: the first of this process). Computes nothing."""
    width = architecture["hidden_size"] // architecture["num_heads"]
    kernels = kernels_for(device or jax.local_devices()[0], compute_dtype, width, dropout_rate > 0)
    module = nnx.eval_shape(
        lambda: VisionTransformer(
            **architecture,
            num_classes=num_classes,
            dropout_rate=dropout_rate,
            dtype=jnp.dtype(compute_dtype),
            kernels=kernels,
            rngs=nnx.Rngs(0),
        )
    )
    return Model(dict(architecture), num_classes, nnx.graphdef(module), _by_path(module), kernels, remat)


def _by_path(module: nnx.Module) -> dict[str, jax.Array]:
    """A flat dict, which JAX flattens in C++ at every step; it would walk an `nnx.State` in Python."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat}
