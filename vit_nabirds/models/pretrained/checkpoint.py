"""Hugging Face checkpoints (ViT, DINOv2, DINOv2 with registers) -> parameters of our model."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import ml_collections
import numpy as np
from safetensors import SafetensorError, safe_open

from vit_nabirds.config.fields import SHAPE
from vit_nabirds.errors import UserError
from vit_nabirds.models.normalization import Normalization

log = logging.getLogger("vit_nabirds")

# What transformers leaves out of a config.json, because it equals the default of the model_type.
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
# What an architecture that does not say otherwise has.
PARTS = {
    "in_channels": 3, "layer_norm_eps": 1e-12, "qkv_bias": True, "layer_scale": False, "gated": False,
    "num_registers": 0, "pool": "cls",
}  # fmt: skip
PAD_TO_SQUARE = "vit_nabirds_pad_to_square"  # field of a preprocessor_config.json of ours


class Tensor(NamedTuple):
    """A tensor in PyTorch's naming and layout, not read yet."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is known to be whole: its configuration and tensors' shapes fit; no tensor is read yet."""

    source: str
    folder: Path
    architecture: dict  # arguments of VisionTransformer
    labels: list[str]  # of its classifier's rows; none without a classifier
    image_size: int  # that its images were resized to: the model's, where the positions are not resized
    normalization: Normalization
    pads_to_square: bool  # how its images were prepared: ours are fitted into a black square
    tensors: dict[str, Tensor]

    def load(self, architecture: dict, labels: list[str], place: Callable = lambda array: array) -> dict:
        """Parameters by path, float32, each given to `place` before the next is read; the log says what came of them.

        Positions are resized to `architecture`; the classifier is loaded when it has all `labels`, in their order.
        """
        same = labels == self.labels  # ImageNet's has two cranes
        with_head = labels and (same or len(set(labels)) == len(labels) and set(labels) == set(self.labels))
        with_head = with_head and architecture["pool"] == self.architecture["pool"]
        order = [i if same else self.labels.index(label) for i, label in enumerate(labels)] if with_head else []
        params, used, resized = {}, [], "none"
        for row in mapping(self.architecture, len(self.labels)):
            if row.path.startswith("classifier/") and not with_head:
                continue
            array = self.tensors[row.name].read()
            if not np.isfinite(array).all():
                raise UserError(f"{self.source}: the tensor {row.name!r} holds values that are not finite.")
            if row.path.startswith("classifier/"):
                array = array[order]
            elif row.path == "position_embeddings" and architecture["img_size"] != self.architecture["img_size"]:
                old, new = (a["img_size"] // a["patch_size"] for a in (self.architecture, architecture))
                array = resize_positions(array, new, antialias=architecture["num_registers"] > 0)
                resized = f"positions of {old} x {old} patches to {new} x {new}"
            used.append(row.name)
            params[row.path] = place(row.to_ours(array))
        log.info(
            "weights of %s\n  loaded   %d tensors (%s)\n  resized  %s\n  new      %s\n  ignored  %s",
            self.source, len(used), ", ".join(sorted({self.tensors[name].dtype for name in used})), resized,
            "none" if with_head else "the classifier", ", ".join(sorted(self.tensors.keys() - used)) or "none",
        )  # fmt: skip
        return params


class Row(NamedTuple):
    """One parameter: our path, the tensor's name and shape in PyTorch, the order of its axes and the shape in ours."""

    path: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    to: tuple[int, ...]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        to = self.to if array.shape == self.shape else array.transpose(self.axes).shape  # resized
        return np.ascontiguousarray(array.transpose(self.axes).reshape(to), np.float32)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        transposed = array.reshape([self.shape[axis] for axis in self.axes])
        return np.ascontiguousarray(transposed.transpose(np.argsort(self.axes)))


def starting_point(config: ml_collections.ConfigDict) -> tuple[dict, Normalization, Checkpoint | None]:
    """Arguments of `VisionTransformer`, normalisation, and the checkpoint with the weights (None: random ones)."""
    if config.model.pretrained:
        checkpoint = open_checkpoint(config.model.pretrained)
        chosen = {"img_size": config.model.image_size or checkpoint.image_size}
        if config.model.pool:
            chosen["pool"] = config.model.pool
        if chosen["img_size"] % checkpoint.architecture["patch_size"]:
            patch_size = checkpoint.architecture["patch_size"]
            raise UserError(f"config.model.image_size is {chosen['img_size']}: choose a multiple of {patch_size}.")
        return checkpoint.architecture | chosen, checkpoint.normalization, checkpoint
    if missing := [field for field in SHAPE if config.model[field] is None]:
        raise UserError(
            f"config.model.{missing[0]} is not set: a model with random weights needs it (or name a checkpoint in "
            "config.model.pretrained)."
        )
    architecture = {"img_size" if field == "image_size" else field: config.model[field] for field in SHAPE}
    if architecture["img_size"] % architecture["patch_size"] or architecture["hidden_size"] % architecture["num_heads"]:
        raise UserError("config.model.image_size must be a multiple of patch_size, and hidden_size of num_heads.")
    return architecture | {"pool": config.model.pool or "cls"}, Normalization(), None


def open_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of a folder or Hub id; UserError names what is missing, misshaped, extra or not supported."""
    folder = find_checkpoint(name)
    hf, processor = read_config(folder), _read_json(folder / "preprocessor_config.json")
    tensors = _canonical(dict(_stored_tensors(folder)))
    architecture = architecture_of(hf)
    labels = []
    if "classifier.weight" in tensors:
        rows = [str(row) for row in range(tensors["classifier.weight"].shape[0])]
        named = hf.get("id2label", {row: f"LABEL_{row}" for row in rows})  # which transformers leaves out
        if (
            not isinstance(named, dict)
            or set(named) != set(rows)
            or not all(isinstance(x, str) for x in named.values())
        ):
            raise UserError(
                f"{folder / 'config.json'}: the classifier has {len(rows)} rows, but id2label is no table of a label "
                f"for each of 0 to {len(rows) - 1}."
            )
        labels = [named[row] for row in rows]
    check_tensors(tensors, architecture, len(labels), str(folder))
    size, normalization = read_processor(processor, hf, folder / "preprocessor_config.json")
    pads = bool(processor.get(PAD_TO_SQUARE))
    return Checkpoint(name, folder, architecture, labels, size, normalization, pads, tensors)


def find_checkpoint(name: str) -> Path:
    """The folder of a Hub id (ORG/MODEL or ORG/MODEL@REVISION, fetched or from the cache) or of a local path."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(
                f"there is no folder {name!r}: give that of a checkpoint, or a Hub id like "
                "'google/vit-base-patch16-224' (a certain revision: ID@REVISION)."
            )
        repository, _, revision = name.partition("@")
        try:
            patterns = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
            download = huggingface_hub.snapshot_download
            folder = Path(download(repository, revision=revision or None, allow_patterns=patterns))
        except Exception as error:  # each version of the Hub's client has its own family of errors
            raise UserError(
                f"the checkpoint {name!r} is no local folder and could not be fetched from the Hugging Face Hub "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). On a node without internet, download it "
                f"on a login node first (`hf download {repository}`), or give its folder."
            ) from None
    return folder


def read_config(folder: Path) -> dict:
    """config.json with the defaults of its model_type filled in; UserError for what our model cannot be."""
    file = folder / "config.json"
    hf = _read_json(file)
    if (model_type := hf.get("model_type")) not in DEFAULTS:
        raise UserError(f"{file}: model_type is {model_type!r}; supported are {', '.join(DEFAULTS)}.")
    hf = DEFAULTS[model_type] | hf
    for field, expected in {"hidden_act": "gelu", "num_channels": 3}.items():
        if hf[field] != expected:
            raise UserError(f"{file}: {field} is {hf[field]!r}; only {expected!r} is supported.")
    for field, default in DEFAULTS[model_type].items():
        value = hf[field]
        real = isinstance(default, float) or field == "mlp_ratio"
        kinds = bool if isinstance(default, bool) else (int, float) if real else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise UserError(f"{file}: {field} is {value!r}, where {default!r} is an example.")
        if field != "num_register_tokens" and not isinstance(value, bool | str) and not 0 < value < math.inf:
            raise UserError(f"{file}: {field} is {value!r}, where {default!r} is an example.")
    for field, divisor in {"image_size": "patch_size", "hidden_size": "num_attention_heads"}.items():
        if hf[field] % hf[divisor]:
            raise UserError(f"{file}: {field} {hf[field]} is no multiple of {divisor} {hf[divisor]}.")
    return hf


def read_processor(processor: dict, hf: dict, file: Path) -> tuple[int, Normalization]:
    """Side of the images in pixels and their normalisation; UserError for what our loader does not do."""

    def require(field: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"{file}: {field} is {processor.get(field)!r}; {expected}.")

    require("do_resize", processor.get("do_resize", True) is True, "only true is supported")
    require("do_rescale", processor.get("do_rescale", True) is True, "only true is supported")
    factor = processor.get("rescale_factor", 1 / 255)
    require("rescale_factor", isinstance(factor, float) and abs(255 * factor - 1) < 1e-6, "only 1/255 is supported")
    field = "crop_size" if processor.get("do_center_crop") else "size"
    size = processor.get(field, hf["image_size"])
    sides = {"height": size, "width": size} if isinstance(size, int) else size
    sides = (
        {sides.get("shortest_edge", sides.get(side)) for side in ("height", "width")} if isinstance(sides, dict) else {}
    )
    require(field, len(sides) == 1 and all(isinstance(x, int) and x > 0 for x in sides), "squares are expected")
    [size] = sides
    require(field, size % hf["patch_size"] == 0, f"a multiple of the patch_size {hf['patch_size']} is expected")
    if not processor.get("do_normalize", True):
        return size, Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    values = []
    for field in ("image_mean", "image_std"):
        value = processor.get(field, [0.5, 0.5, 0.5])
        numbers = isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        require(field, numbers and (field == "image_mean" or min(value) > 0), "three numbers are expected")
        values.append(tuple(value))
    return size, Normalization(*values)


def architecture_of(hf: dict) -> dict:
    """Arguments of `VisionTransformer` from the fields of a config.json with its defaults."""
    dinov2 = hf["model_type"] != "vit"
    gated = dinov2 and hf["use_swiglu_ffn"]
    return {
        "in_channels": hf["num_channels"],
        "img_size": hf["image_size"],
        "patch_size": hf["patch_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "mlp_dim": mlp_width(hf["hidden_size"], hf["mlp_ratio"], gated) if dinov2 else hf["intermediate_size"],
        "hidden_size": hf["hidden_size"],
        "layer_norm_eps": hf["layer_norm_eps"],
        "qkv_bias": hf["qkv_bias"],
        "layer_scale": dinov2,
        "gated": gated,
        "num_registers": hf.get("num_register_tokens", 0),
        "pool": "cls+mean" if dinov2 else "cls",
    }


def mlp_width(hidden_size: int, mlp_ratio: float, gated: bool) -> int:
    """The width that DINOv2's ratio means; SwiGLU has a third matrix, and so two thirds of it."""
    width = int(hidden_size * mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def from_flax_vit(model) -> tuple[dict, dict[str, np.ndarray]]:
    """`FlaxViTForImageClassification` (or Dinov2's) in memory -> (arguments of `VisionTransformer`, all parameters)."""
    hf = model.config
    architecture = architecture_of(DEFAULTS[hf.model_type] | hf.to_dict())

    def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
        for key, value in tree.items():
            if hasattr(value, "items"):
                yield from leaves(value, (*path, key))
            else:
                array = np.asarray(value)
                yield ".".join((*path, key)), Tensor(array.shape, str(array.dtype), lambda array=array: array)

    tensors = _canonical(dict(leaves(model.params)))
    check_tensors(tensors, architecture, hf.num_labels, "the Flax model")
    rows = mapping(architecture, hf.num_labels)
    params = {row.path: row.to_ours(tensors[row.name].read()) for row in rows}
    return architecture | {"num_classes": hf.num_labels}, params


def check_tensors(tensors: dict[str, Tensor], architecture: dict, num_classes: int, source: str) -> None:
    """UserError for a tensor that is missing, misshaped, not of floats, or has no place in the model."""
    rows = {row.name: row for row in mapping(architecture, num_classes) if num_classes or "classifier" not in row.name}
    for name, row in rows.items():
        if name not in tensors:
            raise UserError(f"{source}: the tensor {name!r} is missing; is it a whole checkpoint?")
        if tensors[name].shape != row.shape:
            raise UserError(
                f"{source}: the tensor {name!r} has shape {tensors[name].shape}, but its config.json asks for "
                f"{row.shape}."
            )
        if tensors[name].dtype not in ("F32", "F16", "BF16", "F64", "float32"):
            raise UserError(f"{source}: the tensor {name!r} is of type {tensors[name].dtype}: floats are expected.")
    # Neither is a part of the way from image to logits.
    unused = {name for name in tensors if name.startswith("pooler.") or name == "embeddings.mask_token"}
    if extra := sorted(tensors.keys() - rows - unused):
        raise UserError(f"{source}: {len(extra)} tensors have no place in the model: {', '.join(extra[:5])} …")


def mapping(architecture: dict, num_classes: int) -> list[Row]:
    """Every parameter of the model and the tensor it is in a checkpoint, in the naming that the family's have."""
    a = PARTS | architecture
    d, heads = a["hidden_size"], (a["num_heads"], a["hidden_size"] // a["num_heads"])
    patch_size, channels = a["patch_size"], a["in_channels"]
    vit = family(a) == "vit"
    norm1, norm2 = ("layernorm_before", "layernorm_after") if vit else ("norm1", "norm2")
    first, second = ("intermediate.dense", "output.dense") if vit else ("mlp.fc1", "mlp.fc2")
    if a["gated"]:
        first, second = "mlp.weights_in", "mlp.weights_out"
    rows = []

    def same(path: str, name: str, *shape: int) -> None:
        rows.append(Row(path, name, shape, tuple(range(len(shape))), shape))

    def norm(path: str, name: str) -> None:
        same(f"{path}/scale", f"{name}.weight", d)
        same(f"{path}/bias", f"{name}.bias", d)

    def linear(path: str, name: str, fan_in: int, fan_out: int, kernel=None, bias: tuple | None = ()) -> None:
        rows.append(Row(f"{path}/kernel", f"{name}.weight", (fan_out, fan_in), (1, 0), kernel or (fan_in, fan_out)))
        if bias is not None:
            rows.append(Row(f"{path}/bias", f"{name}.bias", (fan_out,), (0,), bias or (fan_out,)))

    same("cls_token", "embeddings.cls_token", 1, 1, d)
    same("position_embeddings", "embeddings.position_embeddings", 1, (a["img_size"] // patch_size) ** 2 + 1, d)
    if a["num_registers"]:
        same("registers", "embeddings.register_tokens", 1, a["num_registers"], d)
    projection, patch = "embeddings.patch_embeddings.projection", (d, channels, patch_size, patch_size)
    kernel = (patch_size * patch_size * channels, d)
    rows.append(Row("patch_embeddings/kernel", f"{projection}.weight", patch, (2, 3, 1, 0), kernel))
    same("patch_embeddings/bias", f"{projection}.bias", d)
    for i in range(a["num_layers"]):
        ours, theirs = f"encoder/layers/{i}", f"encoder.layer.{i}"
        norm(f"{ours}/norm1", f"{theirs}.{norm1}")
        for part in ("query", "key", "value"):
            bias = heads if a["qkv_bias"] else None
            linear(f"{ours}/attn/{part}", f"{theirs}.attention.attention.{part}", d, d, (d, *heads), bias)
        linear(f"{ours}/attn/out", f"{theirs}.attention.output.dense", d, d, (*heads, d))
        norm(f"{ours}/norm2", f"{theirs}.{norm2}")
        linear(f"{ours}/mlp/layers/0", f"{theirs}.{first}", d, 2 * a["mlp_dim"] if a["gated"] else a["mlp_dim"])
        linear(f"{ours}/mlp/layers/2", f"{theirs}.{second}", a["mlp_dim"], d)
        if a["layer_scale"]:
            same(f"{ours}/scale1", f"{theirs}.layer_scale1.lambda1", d)
            same(f"{ours}/scale2", f"{theirs}.layer_scale2.lambda1", d)
    norm("final_norm", "layernorm")
    linear("classifier", "classifier", d if a["pool"] == "cls" else 2 * d, num_classes)
    return rows


def family(architecture: dict) -> str:
    """The model_type that has this architecture's parts."""
    if architecture.get("num_registers"):
        return "dinov2_with_registers"
    return "dinov2" if architecture.get("layer_scale") or architecture.get("gated") else "vit"


def resize_positions(positions: np.ndarray, new: int, antialias: bool) -> np.ndarray:
    """(1, 1 + n², d) -> (1, 1 + new², d), bicubic as in torch's `interpolate`, and so in Hugging Face.

    DINOv2 with registers asks for antialiasing, for which torch has another cubic and wider windows.
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    a, stretch = (-0.5, max(old / new, 1.0)) if antialias else (-0.75, 1.0)
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    reach = int(np.ceil(2 * stretch)) + 1
    taps = np.floor(centers).astype(int)[:, None] + np.arange(-reach, reach + 1)
    x = np.abs(taps - centers[:, None]) / stretch
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weight = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:  # the window ends at the border, elsewhere the border is repeated
        weight = np.where((taps >= 0) & (taps < old), weight, 0.0)
    weight /= weight.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weight)
    grid = positions[0, 1:].reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("yi,ijd,xj->yxd", matrix, grid, matrix, optimize=True).reshape(1, new * new, -1)
    return np.concatenate([positions[:, :1], grid], axis=1).astype(np.float32)


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _weight_files(folder):
        try:
            opened = safe_open(file, framework="np")
            for name in opened.keys():
                header = opened.get_slice(name)
                read = lambda opened=opened, name=name: opened.get_tensor(name)  # noqa: E731
                yield name, Tensor(tuple(header.get_shape()), header.get_dtype(), read)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a readable safetensors file ({error}): fetch it again.") from None


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index} has no weight_map that names the files of the tensors: fetch it again.")
        files = [folder / name for name in sorted(set(shards.values()))]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]} is missing, which {index.name} names: fetch it again.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors (PyTorch's pickled *.bin is not read): convert it first.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder} holds {names} and no model.safetensors or {index.name}: which one is meant?")
    return files


def _canonical(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by PyTorch's names without the model's prefix, also those that Flax named, in PyTorch's layout."""
    tensors = {}
    for name, tensor in stored.items():
        prefix, _, rest = name.partition(".")
        name = rest if prefix in DEFAULTS else name
        if name.endswith(".kernel"):  # (..., in, out) in Flax, (out, in, ...) in PyTorch
            axes = (3, 2, 0, 1) if len(tensor.shape) == 4 else (1, 0)
            shape = tuple(tensor.shape[axis] for axis in axes)
            tensor = Tensor(shape, tensor.dtype, lambda read=tensor.read, axes=axes: read().transpose(axes))
        for theirs in (".kernel", ".scale"):
            name = name.removesuffix(theirs) + ".weight" if name.endswith(theirs) else name
        tensors[name] = tensor
    return tensors


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} is missing: is {file.parent} a Hugging Face checkpoint folder?") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object.")
    return content
