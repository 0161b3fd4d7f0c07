"""The model card of an exported run: README.md with the Hub's metadata at its head. It names no folder of this machine
but by the last part of its path."""

import html
import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from vit_nabirds.config.fields import with_defaults
from vit_nabirds.config.json_files import read_object
from vit_nabirds.errors import visible
from vit_nabirds.evaluation.views import COUNTS
from vit_nabirds.runs.loading import LoadedRun, is_run
from vit_nabirds.runs.quantities import percent

FIGURES = {
    "accuracy": "top-1 accuracy", "top5_accuracy": "top-5 accuracy", "mean_class_accuracy": "mean per-class accuracy",
}  # fmt: skip
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # of a model on the Hub
WORD = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
LONGEST = 10**6  # characters of another model's card


def model_card(opened: LoadedRun, name: str, share: float | None = None) -> str:
    """README.md for a run from `open_run`, or for a share of its weights, under a name."""
    metadata, config = opened.metadata, opened.metadata.config
    size, title = metadata.architecture["image_size"], visible(name)
    source = visible(named(config["model"]["pretrained"])).replace("`", "'")  # which would end the code
    head = front_matter(opened, title)
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
{head.to_yaml()}
---
# {html.escape(title, quote=False)}

Names {len(metadata.species):,} species of birds in photographs ({size} x {size} pixels). Fine-tuned with vit-nabirds
from `{source}`, and exported after step {opened.step:,}.{weights}

**Measured:** {measured(opened, share)}.

**Data:** {shown} (metadata fingerprint `{metadata.fingerprint}`). If they are from NABirds,
the Cornell Lab of Ornithology collected them, and its terms of use apply. Please credit the photographers, whom the
data set names image by image in `photographers.txt`, wherever you show their pictures.

**Licence:** {terms(head.license, config["model"]["pretrained"])}. The photographs
have terms of their own.

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
{json.dumps(recipe(config), indent=2)}
```
"""


def terms(licence: str | None, pretrained: str) -> str:
    """On whose terms the model may be used, in words."""
    if licence:
        return f"`{licence}`, that of the weights that the training began with"
    if not pretrained:
        return "not chosen yet; the training began with random weights"
    return "unknown, because the weights that the training began with state none. Find out before you share this"


def front_matter(opened: LoadedRun, title: str) -> ModelCardData:
    """The Hub's metadata: what the model is, comes from and was measured at."""
    config = opened.metadata.config
    base, licence = base_of(config["model"]["pretrained"])
    data = visible(Path(config["data"]["root"]).name) or "birds"
    split, values = scores(opened)
    results = [
        EvalResult(
            task_type="image-classification", dataset_type="imagefolder", dataset_name=data, dataset_split=split,
            metric_type=name, metric_name=words, metric_value=round(values[name], 4),
        )
        for name, words in FIGURES.items() if values
    ]  # fmt: skip
    return ModelCardData(
        license=licence, base_model=base, library_name="transformers", pipeline_tag="image-classification",
        tags=["birds", "vision", "vit-nabirds"], datasets=[data] if WORD.fullmatch(data) else None,
        metrics=["accuracy"] if values else None, model_name=title, eval_results=results or None,
    )  # fmt: skip


def base_of(pretrained: str) -> tuple[str | None, str | None]:
    """The model of the Hub that the weights come from, and its licence, as far as their cards say so."""
    source = first_weights(pretrained)
    name, _, revision = source.partition("@")
    is_folder = Path(source).is_dir()
    base = name if not is_folder and ID.fullmatch(name) else None
    try:
        file = try_to_load_from_cache(name, "README.md", revision=revision or None) if base else f"{source}/README.md"
        with open(file, encoding="utf-8") as opened:
            card = ModelCard(opened.read(LONGEST), ignore_metadata_errors=True).data
    except Exception:  # noqa: BLE001, because strangers write cards, and many folders have none
        card = ModelCardData()
    base, licence = base or card.get("base_model"), card.get("license")
    base = base if isinstance(base, str) and ID.fullmatch(base) else None
    return base, licence if isinstance(licence, str) and WORD.fullmatch(licence) else None


def first_weights(pretrained: str) -> str:
    """What the first of some runs started from, each from the one before."""
    for _ in range(100):  # a forged one may start from itself
        if not is_run(Path(pretrained)):
            return pretrained
        pretrained = with_defaults(read_object(Path(pretrained, "config.json")))["model"]["pretrained"]
    return ""


def named(pretrained: str) -> str:
    """Where weights come from, without the path of a folder."""
    is_id = ID.fullmatch(pretrained.partition("@")[0]) and not Path(pretrained).is_dir()
    return pretrained if is_id else Path(pretrained).name or "random weights"


def recipe(config: dict) -> dict:
    """What to train another one with."""
    fields = ("model", "augment", "loss", "lora", "optimizer", "evaluate", "batch_size", "epochs", "ema_decay", "seed")
    data = {name: config["data"][name] for name in ("label", "validation", "sampling", "repeats")}
    model = config["model"] | {"pretrained": config["model"]["pretrained"] and named(config["model"]["pretrained"])}
    return {"data": data} | {name: config[name] for name in (*fields, "trainable")} | {"model": model}


def scores(opened: LoadedRun) -> tuple[str, dict]:
    """The figures of the checkpoint, on the test photographs or else those of its evaluation, and which; or none."""
    split, values = "test", opened.test
    if not values and opened.figures:
        split = "validation" if "val/accuracy" in opened.figures else "test"
        values = {name.partition("/")[2]: value for name, value in opened.figures.items()}
    return split, values if values.keys() >= {*FIGURES, "examples"} else {}


def measured(opened: LoadedRun, share: float | None = None) -> str:
    """The figures in words."""
    split, values = scores(opened)
    if not values:
        return "not evaluated at this step" if share is None else f"not yet; `evaluate --wise={share:g}` does"
    views = COUNTS[opened.metadata.config["evaluate"]["views"]]
    low, high = values.get("accuracy_interval", (None, None))
    interval = f" (95 % interval: {percent(low, 2)} to {percent(high, 2)})" if low is not None else ""
    return (
        f"{percent(values['accuracy'], 2)} top-1{interval}, {percent(values['top5_accuracy'], 2)} top-5 and "
        f"{percent(values['mean_class_accuracy'], 2)} mean per-class accuracy on {values['examples']:,} {split} "
        f"photographs{f', averaged over {views} views of each' if views > 1 else ''}"
    )
