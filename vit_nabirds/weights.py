"""Hugging Face ViT checkpoints -> parameters of our model."""

import json
from pathlib import Path

import huggingface_hub
import ml_collections
import numpy as np
from safetensors import SafetensorError, safe_open

from vit_nabirds.augment import Normalization
from vit_nabirds.config import SHAPE
from vit_nabirds.errors import UserError


def load_pretrained(config: ml_collections.ConfigDict) -> tuple[dict, Normalization, dict[str, np.ndarray]]:
    """Arguments of `VisionTransformer`, normalisation, and all parameters but the classifier's (none if random)."""
    if config.model.pretrained:
        folder = find_checkpoint(config.model.pretrained)
        architecture, normalization = read_architecture(folder)
        return architecture, normalization, load_backbone(folder, architecture)
    if missing := [field for field in SHAPE if config.model[field] is None]:
        raise UserError(
            f"config.model.{missing[0]} is not set: a model with random weights needs it (or name a checkpoint in "
            "config.model.pretrained)."
        )
    architecture = {"img_size" if field == "image_size" else field: config.model[field] for field in SHAPE}
    if architecture["img_size"] % architecture["patch_size"] or architecture["hidden_size"] % architecture["num_heads"]:
        raise UserError("config.model.image_size must be a multiple of patch_size, and hidden_size of num_heads.")
    return architecture, Normalization(), {}


def find_checkpoint(name: str) -> Path:
    """The folder of a Hub id (fetched, or from the cache) or of a local path; safetensors only, never pickle."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(
                f"config.model.pretrained: there is no folder {name!r}: give a checkpoint folder, or a Hub id like "
                "'google/vit-base-patch16-224'."
            )
        try:
            patterns = ["config.json", "preprocessor_config.json", "*.safetensors"]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # each version of the Hub's client has its own family of errors
            raise UserError(
                f"config.model.pretrained: {name!r} is no local folder and could not be fetched from the Hugging Face "
                f"Hub ({type(error).__name__}: {str(error).splitlines()[0]}). On a node without internet, download it "
                f"on a login node first (`hf download {name}`), or give its folder."
            ) from None
    return folder


def read_architecture(folder: Path) -> tuple[dict, Normalization]:
    """Arguments of `VisionTransformer` and the normalisation, from config.json and preprocessor_config.json."""
    file = folder / "config.json"
    hf = _read_json(file)

    def require(field: str, expected, default) -> None:
        if (value := hf.get(field, default)) != expected:
            raise UserError(f"{file}: {field} is {value!r}; only {expected!r} is supported.")

    require("model_type", "vit", None)
    require("hidden_act", "gelu", "gelu")
    require("qkv_bias", True, True)
    names = {
        "in_channels": ("num_channels", 3),
        "img_size": ("image_size", 224),
        "patch_size": ("patch_size", 16),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "mlp_dim": ("intermediate_size", 3072),
        "hidden_size": ("hidden_size", 768),
        "layer_norm_eps": ("layer_norm_eps", 1e-12),
    }  # the defaults are those of transformers' ViTConfig, which leaves out of the file what equals them
    architecture = {ours: hf.get(theirs, default) for ours, (theirs, default) in names.items()}
    preprocessor = folder / "preprocessor_config.json"
    if not preprocessor.is_file():
        raise UserError(f"{preprocessor} is missing: it holds the mean and std that the checkpoint was trained with.")
    pixels = _read_json(preprocessor)
    half = [0.5, 0.5, 0.5]
    return architecture, Normalization(tuple(pixels.get("image_mean", half)), tuple(pixels.get("image_std", half)))


def load_backbone(folder: Path, architecture: dict) -> dict[str, np.ndarray]:
    """All parameters but the classifier's, by path, float32, from the folder's safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors (PyTorch's pickled *.bin is not read): convert it first.")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="flax") as opened:  # flax, for numpy has no bfloat16
                tensors |= {name: np.asarray(opened.get_tensor(name), np.float32) for name in opened.keys()}
        except SafetensorError as error:
            raise UserError(f"{file} is not a readable safetensors file ({error}): fetch it again.") from None
    return convert(tensors, architecture, source=str(folder))


def from_flax_vit(model) -> tuple[dict, dict[str, np.ndarray]]:
    """`FlaxViTForImageClassification` in memory -> (arguments of `VisionTransformer`, all parameters by path)."""
    hf = model.config
    architecture = dict(
        num_classes=hf.num_labels,
        in_channels=hf.num_channels,
        img_size=hf.image_size,
        patch_size=hf.patch_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        mlp_dim=hf.intermediate_size,
        hidden_size=hf.hidden_size,
        layer_norm_eps=hf.layer_norm_eps,
    )
    tensors = {}

    def visit(tree: dict, path: tuple[str, ...]) -> None:
        for key, value in tree.items():
            if hasattr(value, "items"):
                visit(value, path + (key,))
            elif key == "kernel":  # (..., in, out) there, (out, in, ...) in PyTorch's naming
                value = np.asarray(value)
                order = (3, 2, 0, 1) if value.ndim == 4 else (1, 0)
                tensors[".".join(path + ("weight",))] = value.transpose(order)
            else:
                tensors[".".join(path + ("weight" if key == "scale" else key,))] = np.asarray(value)

    visit(model.params, ())
    return architecture, convert(tensors, architecture, source="the Flax model", with_classifier=True)


def convert(
    tensors: dict[str, np.ndarray], architecture: dict, source: str, with_classifier: bool = False
) -> dict[str, np.ndarray]:
    """Tensors in PyTorch's naming -> parameters by path; UserError names a missing, misshaped or extra tensor."""
    if not any(name.startswith("vit.") for name in tensors):  # a ViTModel, saved without its head
        tensors = {"vit." + name: tensor for name, tensor in tensors.items()}
    params, used = {}, set()
    for path, name, shape, order, to in mapping(**architecture):
        if path.startswith("classifier/") and not with_classifier:
            continue
        if name not in tensors:
            raise UserError(f"{source}: the tensor {name!r} is missing; is it a whole ViT checkpoint?")
        if tensors[name].shape != shape:
            raise UserError(
                f"{source}: the tensor {name!r} has shape {tensors[name].shape}, but its config.json asks for {shape}."
            )
        used.add(name)
        params[path] = np.ascontiguousarray(tensors[name].transpose(order).reshape(to), np.float32)
    # The pooler is no part of the classifier's path from image to logits, and the old head gives way to a new one.
    ignored = {name for name in tensors if name.startswith(("vit.pooler.", "classifier.", "vit.classifier."))}
    if extra := sorted(tensors.keys() - used - ignored):
        raise UserError(f"{source}: {len(extra)} tensors have no place in a ViT: {', '.join(extra[:5])} …")
    return params


def mapping(
    hidden_size: int,
    num_heads: int,
    mlp_dim: int,
    num_layers: int,
    patch_size: int,
    img_size: int,
    in_channels: int,
    num_classes: int = 0,
    **_,
):
    """Rows (our path, Hugging Face's name, its shape, its axes in our order, our shape)."""
    d, heads = hidden_size, (num_heads, hidden_size // num_heads)

    def linear(path: str, name: str, fan_in: int, fan_out: int, kernel: tuple | None = None, bias: tuple | None = None):
        yield f"{path}/kernel", f"{name}.weight", (fan_out, fan_in), (1, 0), kernel or (fan_in, fan_out)
        yield f"{path}/bias", f"{name}.bias", (fan_out,), (0,), bias or (fan_out,)

    def norm(path: str, name: str):
        yield f"{path}/scale", f"{name}.weight", (d,), (0,), (d,)
        yield f"{path}/bias", f"{name}.bias", (d,), (0,), (d,)

    tokens = (1, (img_size // patch_size) ** 2 + 1, d)
    patch = (patch_size, patch_size, in_channels, d)
    projection = "vit.embeddings.patch_embeddings.projection"
    yield "cls_token", "vit.embeddings.cls_token", (1, 1, d), (0, 1, 2), (1, 1, d)
    yield "position_embeddings", "vit.embeddings.position_embeddings", tokens, (0, 1, 2), tokens
    yield (
        "patch_embeddings/kernel",
        f"{projection}.weight",
        (d, in_channels, patch_size, patch_size),
        (2, 3, 1, 0),
        patch,
    )
    yield "patch_embeddings/bias", f"{projection}.bias", (d,), (0,), (d,)
    for i in range(num_layers):
        ours, theirs = f"encoder/layers/{i}", f"vit.encoder.layer.{i}"
        yield from norm(f"{ours}/norm1", f"{theirs}.layernorm_before")
        for part in ("query", "key", "value"):
            yield from linear(f"{ours}/attn/{part}", f"{theirs}.attention.attention.{part}", d, d, (d, *heads), heads)
        yield from linear(f"{ours}/attn/out", f"{theirs}.attention.output.dense", d, d, (*heads, d))
        yield from norm(f"{ours}/norm2", f"{theirs}.layernorm_after")
        yield from linear(f"{ours}/mlp/layers/0", f"{theirs}.intermediate.dense", d, mlp_dim)
        yield from linear(f"{ours}/mlp/layers/2", f"{theirs}.output.dense", mlp_dim, d)
    yield from norm("final_norm", "vit.layernorm")
    yield from linear("classifier", "classifier", d, num_classes)


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} is missing: is {file.parent} a Hugging Face checkpoint folder?") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None
