"""Hugging Face ViTs with random tensors, in memory and as checkpoint folders."""

import jax
import numpy as np
from safetensors.flax import save_file
from transformers import FlaxViTForImageClassification, ViTConfig

TINY = ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
    num_labels=9,
)  # fmt: skip


def randomized(config) -> FlaxViTForImageClassification:
    """Every tensor random, so that an exchange of two biases, which start at zero, would show."""
    reference = FlaxViTForImageClassification(config, _do_init=False)
    shapes = jax.eval_shape(lambda: reference.init_weights(jax.random.key(0), reference.input_shape))
    draw = np.random.default_rng(2)
    reference._is_initialized = True  # drawn here instead, for op by op it takes half a minute
    reference.params = jax.tree.map(lambda x: draw.normal(0, 0.05, x.shape).astype(np.float32), shapes)
    return reference


def save_tiny(folder) -> None:
    """A checkpoint folder in PyTorch's naming, as the Hub holds them."""
    reference = randomized(TINY)
    tensors = {}
    for path, value in jax.tree_util.tree_leaves_with_path(reference.params):
        name = ".".join(key.key for key in path)
        if name.endswith("kernel"):
            name, value = name[:-6] + "weight", value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
        tensors[name.replace(".scale", ".weight")] = np.ascontiguousarray(value)
    reference.config.to_json_file(folder / "config.json", use_diff=False)
    save_file(tensors, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
