"""A Hugging Face config.json <-> the architecture of our model (ViT, DINOv2, DINOv2 with registers)."""

import math
from pathlib import Path

from vit_nabirds.config.json_files import read_object
from vit_nabirds.errors import UserError, shown
from vit_nabirds.models.limits import problem_of

# transformers leaves a field out of config.json if its value is the default of the model_type.
_VIT = {
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "qkv_bias": True,
    "hidden_act": "gelu",
}  # fmt: skip
_DINOV2 = _VIT | {"patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False}
DEFAULTS = {
    "vit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2 | {"patch_size": 16, "num_register_tokens": 4},
}
# Defaults of an architecture.
PARTS = {
    "in_channels": 3, "layer_norm_eps": 1e-12, "qkv_bias": True, "layer_scale": False, "gated": False,
    "num_registers": 0, "pool": "cls",
}  # fmt: skip
# Fields of config.json -> arguments of VisionTransformer. The others depend on the family.
_SAME = {
    "num_channels": "in_channels", "image_size": "image_size", "patch_size": "patch_size",
    "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "layer_norm_eps": "layer_norm_eps", "qkv_bias": "qkv_bias",
}  # fmt: skip
SANE = 10**9  # above any number that means something: what is computed of those below does not overflow


def read_json(file: Path) -> dict:
    """The object in a JSON file of a checkpoint folder; UserError for anything else."""
    try:
        return read_object(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: is {file.parent} a Hugging Face checkpoint folder?") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None


def read_config(folder: Path) -> dict:
    """config.json with its model_type's defaults filled in; UserError for what our model does not support."""
    file = folder / "config.json"
    hf = read_json(file)
    if "model_type" not in hf and (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is the workdir of a run: give it as --workdir, or `export` the run first.")
    if not isinstance(model_type := hf.get("model_type"), str) or model_type not in DEFAULTS:
        raise UserError(f"{file}: model_type is {shown(model_type)}; supported are {', '.join(DEFAULTS)}.")
    hf = DEFAULTS[model_type] | hf
    for field, expected in {"hidden_act": "gelu", "num_channels": 3}.items():
        if hf[field] != expected:
            raise UserError(f"{file}: {field} is {shown(hf[field])}; only {expected!r} is supported.")
    for field, default in DEFAULTS[model_type].items():
        if not _is_like(hf[field], default, field):
            raise UserError(f"{file}: {field} is {shown(hf[field])}; expected a value like {default!r}.")
    if problem := problem_of(architecture_of(hf)):
        ours, expected = problem
        field = {ours: theirs for theirs, ours in _SAME.items()} | {"num_registers": "num_register_tokens"}
        field = field.get(ours, "intermediate_size" if model_type == "vit" else "mlp_ratio")
        expected = expected.replace("num_heads", "num_attention_heads")
        raise UserError(f"{file}: {field} is {shown(hf[field])}; expected {expected}.")
    return hf


def _is_like(value, default, field: str) -> bool:
    """Whether a value has the type of the default and, if it is a number, a size that makes sense."""
    if isinstance(default, bool | str) or isinstance(value, bool):
        return type(value) is type(default)
    if not isinstance(value, (int, float) if isinstance(default, float) or field == "mlp_ratio" else int):
        return False
    return (field == "num_register_tokens" or value > 0) and value < SANE


def architecture_of(hf: dict) -> dict:
    """Arguments of `VisionTransformer` from a config.json with its defaults filled in."""
    dinov2 = hf["model_type"] != "vit"
    gated = dinov2 and hf["use_swiglu_ffn"]
    return {ours: hf[theirs] for theirs, ours in _SAME.items()} | {
        "mlp_dim": mlp_width(hf["hidden_size"], hf["mlp_ratio"], gated) if dinov2 else hf["intermediate_size"],
        "layer_scale": dinov2,
        "gated": gated,
        "num_registers": hf.get("num_register_tokens", 0),
        "pool": "cls+mean" if dinov2 else "cls",
    }


def config_of(architecture: dict) -> dict:
    """The fields of config.json from which `architecture_of` makes this architecture."""
    model_type = family(architecture)
    fields = {theirs: architecture[ours] for theirs, ours in _SAME.items()}
    fields |= {"model_type": model_type, "hidden_act": "gelu"}
    if model_type == "vit":
        return fields | {"intermediate_size": architecture["mlp_dim"]}
    if model_type == "dinov2_with_registers":
        fields["num_register_tokens"] = architecture["num_registers"]
    return fields | {"mlp_ratio": _mlp_ratio(architecture), "use_swiglu_ffn": architecture["gated"]}


def mlp_width(hidden_size: int, mlp_ratio: float, gated: bool) -> int:
    """The width that DINOv2's ratio means: two thirds of it for SwiGLU, which has a third matrix."""
    width = int(hidden_size * mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _mlp_ratio(architecture: dict) -> float:
    """The ratio for which `mlp_width` gives mlp_dim."""
    width, hidden_size, gated = architecture["mlp_dim"], architecture["hidden_size"], architecture["gated"]
    ratio = (1.5 if gated else 1.0) * width / hidden_size
    while mlp_width(hidden_size, ratio, gated) < width:  # after rounding
        ratio = math.nextafter(ratio, math.inf)
    return int(ratio) if ratio.is_integer() else ratio  # the Flax class uses the product as a shape


def family(architecture: dict) -> str:
    """The model_type that has this architecture's parts."""
    if architecture.get("num_registers"):
        return "dinov2_with_registers"
    return "dinov2" if architecture.get("layer_scale") or architecture.get("gated") else "vit"
