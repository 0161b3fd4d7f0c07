"""Parameters of our model -> a folder that transformers loads as an image classifier."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vit_nabirds.models.normalization import Normalization
from vit_nabirds.models.pretrained.hf_config import PARTS, config_of, family
from vit_nabirds.models.pretrained.names import mapping
from vit_nabirds.models.pretrained.processor import CROP, PAD_TO_SQUARE

CLASSES = {
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
}


def save_checkpoint(
    folder: Path, architecture: dict, params: dict, labels: list[str], normalization: Normalization, crop: str
) -> None:
    """Write config.json, model.safetensors (float32) and preprocessor_config.json into an existing folder.

    `crop` says what of its photographs the model was trained on: "box" (of the bird) or "none" (all).
    """
    architecture, params = _as_family(PARTS | architecture, params)
    tensors = _tensors(architecture, params, len(labels))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    processor = _processor(architecture["image_size"], normalization, crop)
    for name, content in {"config.json": _config(architecture, labels), "preprocessor_config.json": processor}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _as_family(architecture: dict, params: dict) -> tuple[dict, dict]:
    """A model that computes the same, of a kind for which transformers has a class."""
    if family(architecture) == "vit" and architecture["pool"] == "cls+mean":  # a DINOv2 with scales of one
        ones = np.ones(architecture["hidden_size"], np.float32)
        paths = [f"encoder/layers/{i}/scale{j}" for i in range(architecture["num_layers"]) for j in (1, 2)]
        return architecture | {"layer_scale": True}, params | dict.fromkeys(paths, ones)
    if family(architecture) != "vit" and architecture["pool"] == "cls":  # the mean of the patches gets weights of zero
        kernel = np.asarray(params["classifier/kernel"])
        kernel = np.concatenate([kernel, np.zeros_like(kernel)])
        return architecture | {"pool": "cls+mean"}, params | {"classifier/kernel": kernel}
    return architecture, params


def _config(architecture: dict, labels: list[str]) -> dict:
    model_type = family(architecture)
    fields = {
        "architectures": [CLASSES[model_type]],
        "torch_dtype": "float32",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    return config_of(architecture) | fields | ({} if model_type == "vit" else {"use_mask_token": False})


def _processor(size: int, normalization: Normalization, crop: str) -> dict:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "size": {"height": size, "width": size}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(normalization.mean), "image_std": list(normalization.std),
        PAD_TO_SQUARE: True, CROP: crop,
    }  # fmt: skip


def _tensors(architecture: dict, params: dict, num_classes: int) -> dict[str, np.ndarray]:
    model_type = family(architecture)
    tensors = {}
    for row in mapping(architecture, num_classes):
        name = row.name if "classifier" in row.name else f"{model_type}.{row.name}"
        tensors[name] = row.to_theirs(np.asarray(params[row.path], np.float32))
    if model_type == "dinov2_with_registers":  # its class has one whatever use_mask_token says
        tensors[f"{model_type}.embeddings.mask_token"] = np.zeros((1, architecture["hidden_size"]), np.float32)
    return tensors
