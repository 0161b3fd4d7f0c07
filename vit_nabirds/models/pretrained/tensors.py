"""The tensors of a checkpoint folder, in PyTorch's naming and layout whichever way they are stored."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from vit_nabirds.errors import UserError
from vit_nabirds.models.pretrained.hf_config import DEFAULTS, read_json


class Tensor(NamedTuple):
    """A tensor in PyTorch's layout, not read yet; `dtype` as safetensors names it, such as 'F32'."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors by PyTorch's names without the model's prefix, from either naming. Reads the files' headers only."""
    return dict(_canonical(name, tensor) for file in _weight_files(folder) for name, tensor in _stored(file))


def _stored(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        opened = safe_open(file, framework="np")
        for name in opened.keys():
            header = opened.get_slice(name)
            read = lambda name=name: opened.get_tensor(name)  # noqa: E731
            yield name, Tensor(tuple(header.get_shape()), header.get_dtype(), read)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}): fetch it again.") from None


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index} has no weight_map that names the files of the tensors: fetch it again.")
        files = [folder / name for name in sorted(set(shards.values()))]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]} is missing, but {index.name} names it: fetch it again.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors (PyTorch's pickled *.bin is not read): convert it first.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder} has {names}, but no model.safetensors or {index.name}: keep the file you mean.")
    return files


def _canonical(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    prefix, _, rest = name.partition(".")
    name = rest if prefix in DEFAULTS else name
    stem, _, last = name.rpartition(".")
    if last == "kernel":  # (..., in, out) in Flax, (out, in, ...) in PyTorch
        axes = (3, 2, 0, 1) if len(tensor.shape) == 4 else (1, 0)
        shape = tuple(tensor.shape[axis] for axis in axes)
        tensor = Tensor(shape, tensor.dtype, lambda read=tensor.read: read().transpose(axes))
    return (f"{stem}.weight" if last in ("kernel", "scale") else name), tensor
