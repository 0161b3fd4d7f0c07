"""Write a run's checkpoint as a folder that Hugging Face's transformers loads."""

import html
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from vit_nabirds.errors import UserError, visible

log = logging.getLogger("vit_nabirds")

REQUIRED = ("workdir", "out")
FLAGS = {
    "workdir": (str, "Folder of the run."),
    "step": (int, "Step of the checkpoint (default: the selected one)."),
    "out": (str, "Folder to write; it must not exist."),
    "wise": (str, "Share of the run's weights, the rest are pretrained ones: 0 to 1, or auto (by validation)."),
}
PARALLEL = False
CONFIGURED = ""


def run(options, group) -> int:
    export(Path(options.workdir), Path(options.out), options.step, options.wise)
    return 0


def export(workdir: Path, out: Path, step: int | None = None, wise: str | None = None) -> None:
    """Write the folder `out`, which must not exist, from a run's selected checkpoint or that of a step."""
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out, or remove it first.")
    from vit_nabirds.evaluation.wise import share_of
    from vit_nabirds.models.pretrained.export import save_checkpoint
    from vit_nabirds.runs.loading import open_run

    share = None if wise is None else share_of(wise)
    opened = open_run(workdir, step)
    if share is not None:
        opened, share = between(opened, share)
    metadata = opened.metadata
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_checkpoint(
            unfinished, metadata.architecture, opened.params, metadata.species, metadata.normalization, metadata.crop
        )  # fmt: skip
        (unfinished / "README.md").write_text(model_card(opened, out.name, share))
        unfinished.chmod(0o755)  # mkdtemp and safetensors make them private
        (unfinished / "model.safetensors").chmod(0o644)
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    species = len(metadata.species)
    log.info("%s holds the checkpoint of step %d of %s, for %d species", out, opened.step, workdir, species)


def between(opened, share: float | str):
    """The run with a share of its own weights, and the share; `evaluation.wise` says how."""
    from vit_nabirds.commands.evaluate import data_of, scorer_of
    from vit_nabirds.evaluation.wise import AUTO, check_share, mixed
    from vit_nabirds.parallel.group import ProcessGroup
    from vit_nabirds.parallel.preemption import StopRequest

    check_share(share, opened)
    validation = None
    if share == AUTO:
        root = Path(opened.metadata.config["data"]["root"])
        validation = scorer_of(opened, root, data_of(opened, root, needs_validation=True)[0], "validation")
    return mixed(opened, share, validation, ProcessGroup(), StopRequest())


def model_card(opened, name: str, share: float | None = None) -> str:
    """README.md of the folder, with the Hub's metadata at its head, for a run from `open_run`, or a share of it."""
    metadata, config = opened.metadata, opened.metadata.config
    size, title = metadata.architecture["image_size"], visible(name)
    source = visible(config["model"]["pretrained"] or "random weights").replace("`", "'")  # which would end the code
    fields = ("model", "augment", "loss", "lora", "optimizer", "evaluate", "batch_size", "epochs", "ema_decay", "seed")
    recipe = {"data": {name: config["data"][name] for name in ("label", "validation", "sampling", "repeats")}}
    recipe |= {name: config[name] for name in (*fields, "trainable")}
    shown, advice = "whole photographs", "whole photographs fitted into a black square, so pad yours"
    if metadata.crop == "box":
        shown = "photographs cropped to the birds' bounding boxes"
        advice = "birds cut out and fitted into a black square, so crop to the bird, and pad"
    weights = ""
    if share is not None:
        weights = f"\nThe weights, but for the classifier, are {share:g} of the fine-tuned and {1 - share:.3g} of the "
        weights += "pretrained ones (WiSE-FT)."
    if config["ema_decay"]:
        weights += (
            f"\nThe fine-tuned weights are a moving average over the training's steps (decay {config['ema_decay']:g})."
        )
    return f"""---
library_name: transformers
pipeline_tag: image-classification
tags: [birds, vision]
---
# {html.escape(title, quote=False)}

Names {len(metadata.species):,} species of birds in photographs ({size} x {size} pixels). Fine-tuned with vit-nabirds
from `{source}`, and exported after step {opened.step:,}.{weights}

**Measured:** {measured(opened, share)}.

**Data:** {shown} (metadata fingerprint `{metadata.fingerprint}`). If they are from NABirds,
the Cornell Lab of Ornithology collected them, and its terms of use apply. Please credit the photographers, whom the
data set names image by image in `photographers.txt`, wherever you show their pictures.

**Use:** the model was trained on {advice}:

```python
from PIL import Image, ImageOps
from transformers import pipeline

photo = ImageOps.pad(Image.open("bird.jpg").convert("RGB"), ({size}, {size}))
print(pipeline("image-classification", model={json.dumps(title, ensure_ascii=False)})(photo))
```

A picture of {size} x {size} pixels gives the logits of the training. transformers resizes a larger one by another
method than the training, which changes the probabilities slightly.

**Recipe:**

```json
{json.dumps(recipe, indent=2)}
```
"""


def measured(opened, share: float | None = None) -> str:
    """The figures of the checkpoint in words: on the test photographs, or else those of its evaluation."""
    from vit_nabirds.evaluation.views import COUNTS

    split, values = "test", opened.test
    if not values and opened.figures:
        split = "validation" if "val/accuracy" in opened.figures else "test"
        values = {name.partition("/")[2]: value for name, value in opened.figures.items()}
    if not values.keys() >= {"accuracy", "top5_accuracy", "mean_class_accuracy", "examples"}:
        return "not evaluated at this step" if share is None else f"not yet; `evaluate --wise={share:g}` does"
    views = COUNTS[opened.metadata.config["evaluate"]["views"]]
    low, high = values.get("accuracy_interval", (None, None))
    interval = f" (95 % interval: {percent(low)} to {percent(high)})" if low is not None else ""
    return (
        f"{percent(values['accuracy'])} top-1{interval}, {percent(values['top5_accuracy'])} top-5 and "
        f"{percent(values['mean_class_accuracy'])} mean per-class accuracy on {values['examples']:,} {split} "
        f"photographs{f', averaged over {views} views of each' if views > 1 else ''}"
    )


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"
