"""A run's checkpoint -> a folder that Hugging Face's transformers loads."""

import json
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vit_nabirds.errors import UserError
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.models.pretrained import checkpoint as weights
from vit_nabirds.runs.loading import Run, open_run

log = logging.getLogger("vit_nabirds")

CLASSES = {
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
}


def export(workdir: Path, out: Path, step: int | None = None) -> None:
    """Write the folder `out`, which must not exist, from the best checkpoint of a run or that of a step."""
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out, or remove it first.")
    run = open_run(workdir, step)
    about = run.about
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_checkpoint(unfinished, about.architecture, run.params, about.species, about.normalization)
        (unfinished / "README.md").write_text(model_card(run, out.name))
        unfinished.chmod(0o755)
        (unfinished / "model.safetensors").chmod(0o644)  # both were made for this user alone
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log.info("%s holds the checkpoint of step %d of %s, for %d species", out, run.step, workdir, len(about.species))


def save_checkpoint(
    folder: Path, architecture: dict, params: dict, labels: list[str], normalization: Normalization
) -> None:
    """config.json, model.safetensors and preprocessor_config.json that transformers loads as an image classifier.

    What its class for the family cannot say is written with other parameters that compute the same.
    """
    architecture = weights.PARTS | architecture
    model_type = weights.family(architecture)
    if model_type == "vit" and architecture["pool"] == "cls+mean":  # a DINOv2 whose branches are scaled by one
        model_type, ones = "dinov2", np.ones(architecture["hidden_size"], np.float32)
        paths = [f"encoder/layers/{i}/scale{j}" for i in range(architecture["num_layers"]) for j in (1, 2)]
        params, architecture = params | dict.fromkeys(paths, ones), architecture | {"layer_scale": True}
    if model_type != "vit" and architecture["pool"] == "cls":  # the mean of the patches does not count
        kernel = np.asarray(params["classifier/kernel"])
        params = params | {"classifier/kernel": np.concatenate([kernel, np.zeros_like(kernel)])}
        architecture = architecture | {"pool": "cls+mean"}
    rows = weights.mapping(architecture, len(labels))
    prefixed = {row.name: row.name if "classifier" in row.name else f"{model_type}.{row.name}" for row in rows}
    tensors = {prefixed[row.name]: row.to_theirs(np.asarray(params[row.path], np.float32)) for row in rows}
    d, mlp_dim = architecture["hidden_size"], architecture["mlp_dim"]
    fields = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "torch_dtype": "float32",
        "num_channels": 3,
        "image_size": architecture["img_size"],
        "patch_size": architecture["patch_size"],
        "hidden_size": d,
        "num_hidden_layers": architecture["num_layers"],
        "num_attention_heads": architecture["num_heads"],
        "layer_norm_eps": architecture["layer_norm_eps"],
        "qkv_bias": architecture["qkv_bias"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if model_type == "vit":
        fields["intermediate_size"] = mlp_dim
    else:
        gated = architecture["gated"]
        ratio = (1.5 if gated else 1.0) * mlp_dim / d
        while weights.mlp_width(d, ratio, gated) < mlp_dim:  # by rounding
            ratio = math.nextafter(ratio, math.inf)
        ratio = int(ratio) if ratio.is_integer() else ratio  # the Flax class takes its product for a shape
        fields |= {"mlp_ratio": ratio, "use_swiglu_ffn": gated, "use_mask_token": False}
    if model_type == "dinov2_with_registers":
        fields["num_register_tokens"] = architecture["num_registers"]
        tensors[f"{model_type}.embeddings.mask_token"] = np.zeros((1, d), np.float32)
    side = {"height": architecture["img_size"], "width": architecture["img_size"]}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "size": side, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(normalization.mean), "image_std": list(normalization.std),
        weights.PAD_TO_SQUARE: True,
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in {"config.json": fields, "preprocessor_config.json": processor}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def model_card(run: Run, name: str) -> str:
    """README.md of the folder, with the Hub's metadata at its head."""
    about, config, size = run.about, run.about.config, run.about.architecture["img_size"]
    measured = "not evaluated at this step"
    if run.metrics:
        measured = (
            f"{100 * run.metrics['test/accuracy']:.2f} % top-1, {100 * run.metrics['test/top5_accuracy']:.2f} % top-5 "
            f"and {100 * run.metrics['test/mean_class_accuracy']:.2f} % mean per-class accuracy on "
            f"{run.metrics['test/examples']:,} test photographs"
        )
    recipe = json.dumps({k: config[k] for k in ("model", "optimizer", "batch_size", "epochs", "trainable")}, indent=2)
    return f"""---
library_name: transformers
pipeline_tag: image-classification
tags: [birds, vision]
---
# {name}

Names {len(about.species):,} species of birds in photographs ({size} x {size} pixels). Fine-tuned with vit-nabirds from
`{config["model"]["pretrained"] or "random weights"}`, and exported after step {run.step:,}.

**Measured:** {measured}.

**Data:** photographs cropped to the birds' bounding boxes (metadata fingerprint `{about.fingerprint}`). If they are
NABirds', they were collected by the Cornell Lab of Ornithology, and its terms of use apply. Please credit the
photographers, whom the data set names image by image in `photographers.txt`, wherever you show their pictures.

**Use:** the model was trained on birds cut out and fitted into a black square, so crop to the bird, and pad:

```python
from PIL import Image, ImageOps
from transformers import pipeline

photo = ImageOps.pad(Image.open("bird.jpg").convert("RGB"), ({size}, {size}))
print(pipeline("image-classification", model="{name}")(photo))
```

A picture that already has {size} x {size} pixels gives the logits of the training; a larger one is resized by another
method than the training's, which moves the probabilities a little.

**Recipe:**

```json
{recipe}
```
"""
