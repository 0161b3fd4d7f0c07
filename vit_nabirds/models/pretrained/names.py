"""The two-way table between our parameters and the tensors of a Hugging Face checkpoint."""

from typing import NamedTuple

import numpy as np

from vit_nabirds.errors import UserError, shown
from vit_nabirds.models.pretrained.hf_config import PARTS, family
from vit_nabirds.models.pretrained.tensors import Tensor


class Row(NamedTuple):
    """One parameter: our path, PyTorch's name and shape, and the order of its axes and the shape in our model."""

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


def mapping(architecture: dict, num_classes: int) -> list[Row]:
    """A row for each parameter, with the tensor's name as the family names it."""
    a = PARTS | architecture
    d, patch_size, channels = a["hidden_size"], a["patch_size"], a["in_channels"]
    rows = [
        _same("cls_token", "embeddings.cls_token", 1, 1, d),
        _same("position_embeddings", "embeddings.position_embeddings", 1, (a["image_size"] // patch_size) ** 2 + 1, d),
    ]
    if a["num_registers"]:
        rows.append(_same("registers", "embeddings.register_tokens", 1, a["num_registers"], d))
    kernel, bias = _linear("patch_embeddings", "embeddings.patch_embeddings.projection", patch_size**2 * channels, d)
    rows += [kernel._replace(shape=(d, channels, patch_size, patch_size), axes=(2, 3, 1, 0)), bias]
    for i in range(a["num_layers"]):
        rows += _block(f"encoder/layers/{i}", f"encoder.layer.{i}", a)
    rows += _norm("final_norm", "layernorm", d)
    rows += _linear("classifier", "classifier", d if a["pool"] == "cls" else 2 * d, num_classes)
    return rows


def _block(ours: str, theirs: str, a: dict) -> list[Row]:
    vit, d, width = family(a) == "vit", a["hidden_size"], a["mlp_dim"]
    heads = (a["num_heads"], d // a["num_heads"])
    norm1, norm2 = ("layernorm_before", "layernorm_after") if vit else ("norm1", "norm2")
    first, second = ("intermediate.dense", "output.dense") if vit else ("mlp.fc1", "mlp.fc2")
    if a["gated"]:
        first, second = "mlp.weights_in", "mlp.weights_out"
    rows = _norm(f"{ours}/norm1", f"{theirs}.{norm1}", d)
    for part in ("query", "key", "value"):
        kernel, bias = _linear(f"{ours}/attn/{part}", f"{theirs}.attention.attention.{part}", d, d)
        rows.append(kernel._replace(to=(d, *heads)))
        if a["qkv_bias"]:
            rows.append(bias._replace(to=heads))
    kernel, bias = _linear(f"{ours}/attn/out", f"{theirs}.attention.output.dense", d, d)
    rows += [kernel._replace(to=(*heads, d)), bias]
    rows += _norm(f"{ours}/norm2", f"{theirs}.{norm2}", d)
    rows += _linear(f"{ours}/mlp/layers/0", f"{theirs}.{first}", d, 2 * width if a["gated"] else width)
    rows += _linear(f"{ours}/mlp/layers/2", f"{theirs}.{second}", width, d)
    if a["layer_scale"]:
        rows += [_same(f"{ours}/scale{j}", f"{theirs}.layer_scale{j}.lambda1", d) for j in (1, 2)]
    return rows


def _same(path: str, name: str, *shape: int) -> Row:
    return Row(path, name, shape, tuple(range(len(shape))), shape)


def _norm(path: str, name: str, width: int) -> list[Row]:
    return [_same(f"{path}/scale", f"{name}.weight", width), _same(f"{path}/bias", f"{name}.bias", width)]


def _linear(path: str, name: str, fan_in: int, fan_out: int) -> list[Row]:
    kernel = Row(f"{path}/kernel", f"{name}.weight", (fan_out, fan_in), (1, 0), (fan_in, fan_out))
    return [kernel, _same(f"{path}/bias", f"{name}.bias", fan_out)]


def check_tensors(tensors: dict[str, Tensor], architecture: dict, num_classes: int, source: str) -> None:
    """UserError for a tensor that is missing, misshaped, not of floats, or has no place in the model."""
    rows = {row.name: row for row in mapping(architecture, num_classes) if num_classes or "classifier" not in row.name}
    for name, row in rows.items():
        if name not in tensors:
            raise UserError(f"{source}: the tensor {name!r} is missing: is the checkpoint complete?")
        shape, dtype, _ = tensors[name]
        if shape != row.shape:
            raise UserError(f"{source}: the tensor {name!r} has shape {shape}; config.json implies {row.shape}.")
        if dtype not in ("F32", "F16", "BF16", "F64"):
            raise UserError(f"{source}: the tensor {name!r} has type {dtype}; expected floats.")
    # The logits depend on neither.
    unused = {name for name in tensors if name.startswith("pooler.") or name == "embeddings.mask_token"}
    if extra := sorted(tensors.keys() - rows - unused):
        names = ", ".join(shown(name, 100) for name in extra[:5])
        raise UserError(f"{source}: {len(extra)} tensors have no place in the model: {names} …")
