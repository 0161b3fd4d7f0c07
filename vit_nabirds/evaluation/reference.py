"""A Hugging Face checkpoint, computed by our model and by transformers'."""

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from vit_nabirds.errors import UserError
from vit_nabirds.models.model import describe
from vit_nabirds.models.pretrained.checkpoint import Checkpoint
from vit_nabirds.models.pretrained.export import CLASSES
from vit_nabirds.models.pretrained.hf_config import family


def top5(logits: np.ndarray, labels: list[str]) -> list[tuple[str, float]]:
    """The likeliest labels with their probabilities; empty for a checkpoint without a classifier."""
    p = np.exp(logits - logits.max())
    return [(labels[i], p[i] / p.sum()) for i in np.argsort(-logits)[:5]] if labels else []


def outputs(checkpoint: Checkpoint, pixels: np.ndarray) -> np.ndarray:
    """Our logits for float32 (batch, size, size, 3); without a classifier, the final class token."""
    architecture = checkpoint.architecture | ({} if checkpoint.labels else {"pool": "cls"})
    model = describe(architecture, max(len(checkpoint.labels), 1))
    params = checkpoint.load(architecture, checkpoint.labels)
    if checkpoint.labels:
        return np.asarray(model.jit(model.logits)(params, pixels))
    params = {path: jnp.zeros(like.shape) for path, like in model.shapes.items()} | params
    return np.asarray(model.jit(lambda params, x: model.bind(params).features(x))(params, pixels))


def load_reference(checkpoint: Checkpoint) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """A function that computes `outputs` with transformers, by Flax or else by torch, and the name of its class."""
    import transformers

    transformers.logging.set_verbosity_error()
    name = CLASSES[family(checkpoint.architecture)]
    if not checkpoint.labels:
        name = name.replace("ForImageClassification", "Model")

    def output(answer):
        return answer.logits if checkpoint.labels else answer.last_hidden_state[:, 0]

    if flax := getattr(transformers, f"Flax{name}", None):
        network = _from_pretrained(flax, checkpoint)
        forward = jax.jit(lambda params, x: output(network(pixel_values=x, params=params)))
        return lambda pixels: np.asarray(forward(network.params, pixels.transpose(0, 3, 1, 2))), f"Flax{name}"
    if importlib.util.find_spec("torch"):
        import torch

        network = _from_pretrained(getattr(transformers, name), checkpoint, dtype=torch.float32).eval()

        def forward(pixels: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return output(network(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))).numpy()

        return forward, name
    raise UserError(
        f"there is no reference to verify with: transformers {transformers.__version__} has no Flax{name}, and torch "
        "is not installed (`pip install torch`, or transformers 4 for ViT, and for DINOv2 without registers)."
    )


def _from_pretrained(cls, checkpoint: Checkpoint, **options):
    # Of the folder these files only: transformers would sooner take weights in other formats, which we have not read.
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Exception):
        for file in checkpoint.folder.iterdir():
            if file.name == "config.json" or file.name.endswith((".safetensors", ".safetensors.index.json")):
                Path(folder, file.name).symlink_to(file.absolute())
        return cls.from_pretrained(folder, **options)
    # Not every class reads shards, or other names of files or tensors: from a single file, with PyTorch's names.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(checkpoint.folder / "config.json", folder)
        prefix = family(checkpoint.architecture) + "." if checkpoint.labels else ""
        tensors = {
            name if name.startswith("classifier.") else prefix + name: np.ascontiguousarray(tensor.read())
            for name, tensor in checkpoint.tensors.items()
        }
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        try:
            return cls.from_pretrained(folder, **options)
        except Exception as error:  # transformers raises many types
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"transformers' {cls.__name__} cannot load {checkpoint.folder}: {message}") from None
