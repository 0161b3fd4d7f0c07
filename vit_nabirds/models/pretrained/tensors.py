"""The tensors of a checkpoint folder, in PyTorch's naming and layout whichever way they are stored."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from vit_nabirds.errors import UserError, shown
from vit_nabirds.models.pretrained.hf_config import DEFAULTS, read_json

SHARD = re.compile(r"[\w-][\w.-]{0,199}\.safetensors")  # a name in the folder itself
LARGEST_HEADER = 2**24  # bytes; of the largest ViT, which has some thousand tensors, it is 2**18


class Tensor(NamedTuple):
    """A tensor in PyTorch's layout, not read yet; `dtype` as safetensors names it, such as 'F32'."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors by PyTorch's names without the model's prefix, from either naming. Reads the files' headers only."""
    tensors = {}
    for file in _weight_files(folder):
        for stored, tensor in _stored(file):
            name, tensor = _canonical(stored, tensor)
            if name in tensors:
                raise UserError(f"{file}: the tensor {shown(name)} is there twice: fetch the checkpoint again.")
            tensors[name] = tensor
    return tensors


def _stored(file: Path) -> Iterator[tuple[str, Tensor]]:
    if not _lies_in(file, file.parent):
        raise UserError(f"{file} is a link to a file that is not of this checkpoint: put the file itself there.")
    try:
        with file.open("rb") as start:
            if int.from_bytes(start.read(8), "little") > LARGEST_HEADER:
                raise SafetensorError("its header is too large")
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
        if not isinstance(shards, dict) or not all(isinstance(x, str) and SHARD.fullmatch(x) for x in shards.values()):
            raise UserError(
                f"{index} has no weight_map that names *.safetensors of this folder for the tensors: fetch it again."
            )
        files = [folder / name for name in sorted(set(shards.values()))]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]} is missing, but {index.name} names it: fetch it again.")
        return files
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())  # a pipe would be waited for
    if not files:
        raise UserError(f"{folder} has no *.safetensors (PyTorch's pickled *.bin is not read): convert it first.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder} has {names}, but no model.safetensors or {index.name}: keep the file you mean.")
    return files


def _lies_in(file: Path, folder: Path) -> bool:
    """Whether a file is in the folder, or is a link to one in the Hub's cache that the folder is a snapshot of."""
    place = file.resolve().parent
    cache = folder.resolve().parent
    return place == folder.resolve() or cache.name == "snapshots" and place == cache.parent / "blobs"


def _canonical(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    prefix, _, rest = name.partition(".")
    name = rest if prefix in DEFAULTS else name
    stem, _, last = name.rpartition(".")
    if last == "kernel" and len(tensor.shape) in (2, 4):  # (..., in, out) in Flax, (out, in, ...) in PyTorch
        axes = (3, 2, 0, 1) if len(tensor.shape) == 4 else (1, 0)
        shape = tuple(tensor.shape[axis] for axis in axes)
        tensor = Tensor(shape, tensor.dtype, lambda read=tensor.read: read().transpose(axes))
    return (f"{stem}.weight" if last in ("kernel", "scale") else name), tensor
