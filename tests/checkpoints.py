"""Checkpoint folders in the Hub's form, with random tensors."""

import json

from reference_logits import drawn
from safetensors.numpy import save_file

from vit_nabirds.models.pretrained.hf_config import DEFAULTS, architecture_of
from vit_nabirds.models.pretrained.names import mapping

TINY = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
    num_labels=9,
)  # fmt: skip


def save_tiny(folder) -> None:
    save_drawn(folder, "vit", TINY)


def save_drawn(folder, model_type, fields) -> None:
    """An image classifier in PyTorch's naming."""
    labels = fields["num_labels"]
    config = {name: value for name, value in fields.items() if name != "num_labels"} | {"model_type": model_type}
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
    architecture = architecture_of(DEFAULTS[model_type] | config)
    rows = mapping(architecture, labels)
    names = {row.name if "classifier" in row.name else f"{model_type}.{row.name}": row.shape for row in rows}
    if model_type != "vit":
        names[f"{model_type}.embeddings.mask_token"] = (1, architecture["hidden_size"])
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: drawn(name, shape) for name, shape in names.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
