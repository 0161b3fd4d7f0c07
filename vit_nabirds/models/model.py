"""A transformer's structure, apart from its parameters, which are a flat dict of arrays by path."""

import dataclasses
import re
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from flax import nnx

from vit_nabirds.config.fields import Lora
from vit_nabirds.errors import ConfigError
from vit_nabirds.models.kernels import Kernels, kernels_for
from vit_nabirds.models.vit import NO_LORA, VisionTransformer
from vit_nabirds.parallel.sharding import gather, split_axis

# What the backward pass keeps of a block, for each kind of remat; of parameters that are gathered for it, nothing.
KEPT = {
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "elementwise": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


FEW = 8  # parameters, like a classifier's, that compile sooner than all the others are drawn


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer without its parameters: structure, shapes of the parameters by path, and how it is compiled."""

    architecture: dict  # arguments of VisionTransformer
    num_classes: int
    graphdef: nnx.GraphDef
    shapes: dict[str, jax.ShapeDtypeStruct]  # by path, e.g. 'encoder/layers/0/attn/query/kernel'
    kernels: Kernels
    compute_dtype: str
    remat: str  # what of a block the backward pass computes again: "none", "elementwise" or "blocks"
    head_stddev: float = 0.0  # of the classifier's first weights
    lora: Lora = NO_LORA  # low-rank changes, as 'encoder/layers/0/attn/query/lora/lora_a' and '.../lora_b'

    @property
    def num_stages(self) -> int:
        """Tokens, each block, classifier: the parts of the computation, of which each takes the result of the last."""
        return self.architecture["num_layers"] + 2

    def stage_of(self, path: str) -> int:
        """The stage that a parameter belongs to."""
        if block := re.match(r"encoder/layers/(\d+)/", path):
            return 1 + int(block[1])
        return self.num_stages - 1 if path.startswith(("final_norm/", "classifier/")) else 0

    def kept_of(self, number: int) -> Callable | None:
        """What is kept of a stage for the backward pass, as a policy of `jax.checkpoint`; None: all that it needs."""
        return KEPT.get(self.remat) if 0 < number < self.num_stages - 1 else None

    def stage(
        self, number: int, params: dict, keys: jax.Array | None, own: dict, x: jax.Array, sum_dtype: str = "float32"
    ) -> jax.Array:
        """One stage, with `own` in place of those of all parameters. Those of which each device has a part are put
        together; their gradients are added up in `sum_dtype`."""
        params, last = params | own, self.num_stages - 1
        dtype = "float32" if number == last else self.compute_dtype
        for path, part in params.items():
            axis = split_axis(part, self.shapes[path].shape)
            if axis is not None and self.stage_of(path) == number:
                params = params | {path: gather(part, axis, dtype, sum_dtype)}
        return self.bind(params).stage(number, x, keys)

    def bind(self, params: dict[str, jax.Array]) -> VisionTransformer:
        """The module with these parameters."""
        flat = {tuple(int(p) if p.isdigit() else p for p in path.split("/")): x for path, x in params.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state({path: nnx.Param(x) for path, x in flat.items()}))

    def logits(self, params: dict[str, jax.Array], images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """float32 (batch, num_classes) of normalised images (batch, image_size, image_size, channels).

        With a key for each image, activations are dropped.
        """
        return self.bind(params)(images, keys)

    def initial_params(self, seed: int, paths: Collection[str] | None = None) -> dict[str, jax.Array]:
        """Random float32 parameters by path, all or those of some paths, on one device.

        Drawn one by one: XLA would put all draws of a jitted function into one kernel, which for ViT-B takes four
        minutes to compile for a GPU.
        """
        paths = self.shapes if paths is None else paths
        parts = dict(num_classes=self.num_classes, head_stddev=self.head_stddev, lora=self.lora)

        def draw() -> dict[str, jax.Array]:
            drawn = _by_path(VisionTransformer(**self.architecture, **parts, rngs=nnx.Rngs(seed)))
            return {path: drawn[path] for path in paths}

        return jax.jit(draw)() if len(paths) < FEW else draw()

    @property
    def stored_paths(self) -> list[str]:
        """What a checkpoint holds: all parameters, or the changes and the classifier of a model with LoRA."""
        adapts = self.lora.rank > 0
        return [p for p in self.shapes if not adapts or "/lora/" in p or p.startswith("classifier/")]

    def merged(self, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Parameters of the plain model that computes the same: each kernel with its change, alpha / rank * A B."""
        plain = {path: x for path, x in params.items() if "/lora/" not in path}
        for layer in [path.removesuffix("/lora/lora_a") for path in params if path.endswith("/lora/lora_a")]:
            change = jnp.matmul(params[f"{layer}/lora/lora_a"], params[f"{layer}/lora/lora_b"], precision="highest")
            kernel = plain[f"{layer}/kernel"]
            plain[f"{layer}/kernel"] = kernel + (self.lora.alpha / self.lora.rank * change).reshape(kernel.shape)
        return plain

    def jit(self, function: Callable, **options) -> Callable:
        """`jax.jit` for a function that runs the model, with the platform's compiler options."""
        return jax.jit(function, compiler_options=dict(self.kernels.compiler_options) or None, **options)


def describe(
    architecture: dict,
    num_classes: int,
    compute_dtype: str = "float32",
    dropout_rate: float = 0.0,
    remat: str = "none",
    device: jax.Device | None = None,
    drop_path: float = 0.0,
    head_stddev: float = 0.0,
    lora: Lora = NO_LORA,
) -> Model:
    """The model of an architecture for a device (default: the first of this process). Computes nothing."""
    width = architecture["hidden_size"] // architecture["num_heads"]
    kernels = kernels_for(device or jax.local_devices()[0], compute_dtype, width, dropout_rate > 0)
    module = nnx.eval_shape(
        lambda: VisionTransformer(
            **architecture,
            num_classes=num_classes,
            dropout_rate=dropout_rate,
            drop_path=drop_path,
            lora=lora,
            dtype=jnp.dtype(compute_dtype),
            kernels=kernels,
            rngs=nnx.Rngs(0),
        )
    )
    shapes = _by_path(module)
    if lora.rank and not any("/lora/" in path for path in shapes):
        raise ConfigError(
            f"config.lora.targets {lora.targets!r} matches no layer of a block; their paths are like "
            "encoder/layers/0/attn/query, key, value or out, and encoder/layers/0/mlp/layers/0 or 2."
        )
    for path, x in shapes.items():
        if path.endswith("/lora/lora_a") and lora.rank > (most := min(x.shape[0], shapes[f"{path[:-1]}b"].shape[-1])):
            layer = path.removesuffix("/lora/lora_a")
            raise ConfigError(f"config.lora.rank is {lora.rank}, but {layer} has no more than {most}: choose less.")
    structure = dict(architecture), num_classes, nnx.graphdef(module), shapes
    return Model(*structure, kernels, compute_dtype, remat, head_stddev, lora)


def _by_path(module: nnx.Module) -> dict[str, jax.Array]:
    """A flat dict, which JAX flattens in C++ at every step; it would walk an `nnx.State` in Python."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat}
