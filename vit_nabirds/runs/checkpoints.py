"""Checkpoints of a run: plain Orbax trees by path, written in the background, with a checksum of every array."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from vit_nabirds.config.fields import SHAPE, Config, with_defaults
from vit_nabirds.errors import TransientError, UserError, shown, visible
from vit_nabirds.files import crc32_of
from vit_nabirds.models.limits import problem_of
from vit_nabirds.models.normalization import RANGES, Normalization, are_valid
from vit_nabirds.models.pretrained.hf_config import PARTS
from vit_nabirds.parallel.locks import lock

FORMAT = 2  # of the metadata below and of the trees
Arrays = dict[str, jax.Array]  # by path, like 'encoder/layers/0/norm1/scale'


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What is needed to use a checkpoint without its photographs."""

    config: dict
    architecture: dict  # arguments of VisionTransformer
    species: list[str]  # by label
    normalization: Normalization
    fingerprint: str  # of the photographs
    crop: str = "box"  # or "none": what part of the photographs the run has seen
    base: str | None = None  # `base_checksum` of the weights that the run started from, if they were not random
    # Changes on the way, like {"step": 20, "changed": {"epochs": "2.0 -> 4.0"}}.
    history: list[dict] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, fields: dict) -> Self:
        """UserError for what no version of this program writes."""
        fields = {"crop": "box", "base": None, "history": []} | fields  # earlier versions knew nothing else
        if wrong := [name for name, holds in _CHECKS.items() if not holds(fields.get(name))]:
            raise UserError(f"{wrong[0]} is {shown(fields.get(wrong[0]))}, which this program does not write")
        config = with_defaults(fields["config"])
        Config.read(config)
        fields = {field.name: fields[field.name] for field in dataclasses.fields(cls)} | {"config": config}
        fields["species"] = [visible(name) for name in fields["species"]]
        return cls(**fields | {"normalization": Normalization(**_tuples(fields["normalization"]))})


def _tuples(lists: dict[str, list]) -> dict[str, tuple]:
    return {name: tuple(values) for name, values in lists.items()}


def _is_architecture(value: object) -> bool:
    known = PARTS.keys() | set(SHAPE)
    return isinstance(value, dict) and value.keys() <= known and problem_of(PARTS | value) is None


def _is_normalization(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == RANGES.keys() and all(are_valid(*item) for item in value.items())


def _is_word(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-]{1,100}", value) is not None


def _are_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) and len(x) <= 1_000 for x in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "architecture": _is_architecture,
    "species": _are_names,
    "normalization": _is_normalization,
    "fingerprint": _is_word,
    "crop": _is_word,
    "base": lambda value: value is None or _is_word(value),
    "history": lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
}


class DamagedCheckpoint(TransientError):
    """A checkpoint whose bits are not those that were written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} is damaged: delete that folder to go on from the checkpoint before it.")
        self.folder = folder


@contextlib.contextmanager
def damage_set_aside(workdir: Path, is_locked: bool = True) -> Iterator[None]:
    """Move a checkpoint of the run that turns out to be damaged to WORKDIR/damaged, unless there is no other, and raise
    it on with words that say so. `is_locked`: this process, or another of its job, has the run's lock."""
    try:
        yield
    except DamagedCheckpoint as damage:
        folder, aside = damage.folder, workdir / "damaged"
        if folder.parent != (workdir / "checkpoints").absolute():
            raise  # of the run that this one starts from
        others = [int(file.name) for file in folder.parent.iterdir() if file.name.isdecimal() and file != folder]
        if not others:
            damage.args = (
                f"{folder} is damaged, and there is no other: delete it to start the run from its first step.",
            )
            raise
        busy = f"{damage} Another process works in {workdir}, so it was left there."
        try:
            held = contextlib.nullcontext() if is_locked else lock(workdir / "lock", busy)
        except UserError as error:  # perhaps another process of the same job moves it
            raise TransientError(str(error)) from None
        with held:
            aside.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process has moved it
                folder.rename(free_name(aside / folder.name))
        damage.args = (f"{folder} is damaged and lies in {aside} now: the run goes on from step {max(others)}.",)
        raise


def free_name(path: Path) -> Path:
    """The path, or with .1, .2, ... behind it the first that does not exist."""
    names = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(1)))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


# What Orbax raises of metadata that it has not written.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError)


class Checkpoints:
    """The folder `checkpoints` of a run. The two newest are kept (if the machine dies while one is written, the other
    is whole), and those that `keep` names of all steps."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self.keep: Callable[[list[int]], list[int]] = lambda steps: []
        self._saving, self._error = None, None  # the thread that waits for the save under way, and why that has failed
        self._newest = None  # step of the last save that is complete
        self._has_leftovers = False  # of saves that have failed, perhaps with threads that still write
        self._open = functools.partial(
            ocp.training.Checkpointer,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=self,
        )
        try:
            self._orbax = self._open(folder.absolute(), cleanup_tmp_directories=not read_only)
        except _UNREADABLE as error:
            if isinstance(error, OSError) and error.errno != errno.EOVERFLOW:  # which a date in the year 10^20 raises
                raise
            if damaged := self._first_damaged(folder.absolute()):
                raise DamagedCheckpoint(damaged) from None
            raise UserError(
                f"{folder} has a checkpoint whose _CHECKPOINT_METADATA is not what this program writes "
                f"({shown(str(error))}): delete that checkpoint."
            ) from None

    def _first_damaged(self, folder: Path) -> Path | None:
        """The checkpoint that Orbax does not open even alone."""
        for step in sorted(
            (file for file in folder.iterdir() if file.name.isdecimal()), key=lambda file: int(file.name)
        ):
            with tempfile.TemporaryDirectory() as alone:
                (Path(alone) / step.name).symlink_to(step)
                try:
                    self._open(Path(alone), cleanup_tmp_directories=False).close()
                except _UNREADABLE:
                    return step
        return None

    def should_preserve(self, checkpoints: list, *, context: Any) -> list[bool]:
        """Orbax's PreservationPolicy."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-2:], *self.keep(steps)}
        return [step in kept for step in steps]

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, parts: dict[str, Arrays], digests: "Digests", metadata: Metadata) -> None:
        """Copy the arrays of {part: arrays by path} off the devices and return; the rest happens in the background."""
        arrays = {
            name: {path: _described(array, digests[name][path]) for path, array in part.items()}
            for name, part in parts.items()
        }
        options = ocp.Context()
        options.array.saving.use_compression = False  # it doubles the time of writing, which steps pay for
        options.array.saving.storage_options.chunk_byte_size = 2**26
        options.array.saving.array_metadata_store = None
        options.array.saving.use_replica_parallel = False  # it cuts up copies of the arrays on the devices
        options.array.saving.use_zarr3 = False  # a third slower to read, for checksums of its own
        self.wait()
        self._check_folder(step)
        if self._has_leftovers:
            for folder in Path(self._orbax.directory).glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(folder, ignore_errors=True)
        fields = json.loads(json.dumps(dataclasses.asdict(metadata) | {"format": FORMAT, "arrays": arrays}))
        with options:
            saving = self._orbax.save_checkpointables_async(
                step, parts, custom_metadata=fields | {"crc32": crc32_of(fields)}
            )
        self._saving = threading.Thread(target=self._finish, args=[step, saving], daemon=True)
        self._saving.start()

    def _finish(self, step: int, saving: Any) -> None:
        """Only the result ends the thread and the event loop that Orbax gave the save."""
        try:
            saving.result()
            self._newest = step
        except Exception as error:  # noqa: BLE001, of any library, for `wait`
            self._error = error

    @property
    def newest(self) -> int | None:
        """Step of the last save of this process that is complete."""
        return self._newest

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has: `wait` says why."""
        return self._error is not None

    def _check_folder(self, step: int) -> None:
        """UserError if somebody has removed what was saved before: Orbax would go on in a new folder."""
        folder = Path(self._orbax.directory)
        if not folder.is_dir() or self._newest is not None and not (folder / str(self._newest)).is_dir():
            raise UserError(
                f"{folder} was removed or emptied while the run was writing to it, and step {step} is not saved: keep "
                "other programs out of the workdir, and run the same command again."
            )

    def metadata(self, step: int) -> Metadata:
        fields = self._stored(step)
        try:
            return Metadata.from_json(fields)
        except UserError as error:
            folder = self._orbax.directory / str(step)
            raise UserError(f"the metadata of {folder} are of no use here: {error}") from None

    def paths(self, step: int, part: str) -> list[str]:
        """Of the arrays in a part; UserError if there is no such part."""
        arrays = self._stored(step)["arrays"]
        if part not in arrays:
            raise self._of_another_version(step)
        return list(arrays[part])

    def fits(self, step: int, like: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> bool:
        """Whether the parts named in `like` have arrays of these paths, dtypes and shapes."""
        return _fit(self._stored(step)["arrays"], like)

    def restore(self, step: int, like: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> dict[str, Arrays]:
        """The parts named in `like`, each array on the sharding that `like` gives it."""
        stored = self._stored(step)["arrays"]
        if not _fit(stored, like):
            raise self._of_another_version(step)
        try:
            parts = self._orbax.load_checkpointables(step, like)
        except (ValueError, KeyError, OSError) as error:
            raise self._unusable(step, error) from error
        found = digest(parts, on_host=True)
        if any(stored[name][path][2] != x.checksum for name, part in found.items() for path, x in part.items()):
            raise self._unusable(step)
        return parts

    def close(self) -> None:
        """Wait until the save under way is complete."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _stored(self, step: int) -> dict:
        """What `save` stored beside the arrays; UserError if it is damaged or of another version."""
        try:
            fields = dict(self._orbax.checkpointables_metadata(step).custom_metadata)
        except (AttributeError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
            raise self._unusable(step, error) from error
        if "fingerprint" in fields and "crc32" not in fields and "format" not in fields:  # the first format
            raise self._of_another_version(step)
        if fields.pop("crc32", None) != crc32_of(fields):
            raise self._unusable(step)
        if fields.get("format") != FORMAT:
            raise self._of_another_version(step)
        if not _are_described(fields.get("arrays")):
            raise self._unusable(step)
        return fields

    def wait(self) -> None:
        """Wait for the save under way, and raise why it has failed."""
        if self._saving:
            self._saving.join()
        error, self._saving, self._error = self._error, None, None
        if error:
            if jax.process_count() == 1:  # the old one would raise this error again
                threading.Thread(target=_close, args=[self._orbax], daemon=True).start()
                self._orbax, self._has_leftovers = self._open(Path(self._orbax.directory)), True
            raise error

    def _of_another_version(self, step: int) -> UserError:
        folder = self._orbax.directory / str(step)
        return UserError(
            f"{folder} was written by another version of this program: use that version, or another --workdir."
        )

    def _unusable(self, step: int, error: BaseException | None = None) -> UserError:
        """Why a checkpoint fails to load: damaged is only what was read and found wrong."""
        folder = self._orbax.directory / str(step)
        if reason := reading_error(folder, error):
            return TransientError(
                f"{folder} cannot be read ({reason}): that does not mean that it is damaged. Keep it, and run the same "
                "command again when the storage answers."
            )
        return DamagedCheckpoint(Path(folder))


@dataclasses.dataclass(frozen=True)
class Digest:
    """Of one array: two sums of its bits (a file system may give back what was not written), and if all is finite."""

    checksum: list[int]
    is_finite: bool


Digests = dict[str, dict[str, Digest]]  # by part and path


def digest(parts: dict[str, Arrays], on_host: bool = False) -> Digests:
    """Of every array, computed where it lies; those of which this process has all `on_host`, or where that is in the
    host's memory, without a compiled program for each shape."""

    def sums_of(x: jax.Array) -> list | jax.Array:
        if not x.is_fully_replicated:  # one after another: on CPUs, sums over devices that overlap wait for each other
            return jax.block_until_ready(_sums_on_device(x))
        near = on_host or all(device.platform == "cpu" for device in x.devices())
        return _sums(np.asarray(x)) if near else _sums_on_device(x)

    sums = jax.device_get(jax.tree.map(sums_of, parts))
    return {
        name: {path: Digest([int(x[0]), int(x[1])], bool(x[2])) for path, x in part.items()}
        for name, part in sums.items()
    }


def _sums(x: np.ndarray | jax.Array) -> list:
    """Sum and weighted sum of the bits, and whether every value is finite; NumPy and JAX give the same."""
    xp = x.__array_namespace__()
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype("uint32")
    odd = xp.ones((), "uint32")  # 1, 3, 5, ... in the order of the elements, but without a reshape: x may be split
    for axis, length in enumerate(x.shape):
        sides = [length if other == axis else 1 for other in range(x.ndim)]
        odd = odd + xp.arange(length, dtype="uint32").reshape(sides) * np.uint32(2 * math.prod(x.shape[axis + 1 :]))
    with np.errstate(over="ignore", invalid="ignore"):  # the answer says so
        return [xp.sum(bits, dtype="uint32"), xp.sum(bits * odd, dtype="uint32"), xp.isfinite(xp.sum(x))]


@jax.jit
def _sums_on_device(x: jax.Array) -> jax.Array:
    return jnp.stack([value.astype(jnp.uint32) for value in _sums(x)])


def sha256_of(array: np.ndarray | jax.Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def base_checksum(digests: Mapping[str, str]) -> str:
    """Of the weights that a run starts from, by the `sha256_of` of each float32 parameter, by path.

    Not of the classifier, which is new, nor of positions: where they are resized, machines may round differently.
    """
    left_out = ("position_embeddings", "classifier/")
    kept = [f"{path} {digests[path]}" for path in sorted(digests) if not path.startswith(left_out)]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def _described(array: jax.Array | jax.ShapeDtypeStruct, found: Digest | None = None) -> list:
    return [str(array.dtype), list(array.shape), *([found.checksum] if found else [])]


def _close(orbax: ocp.training.Checkpointer) -> None:
    with contextlib.suppress(Exception):  # that of the save that has failed
        orbax.close()


def _are_described(parts: object) -> bool:
    """Whether it is what `save` says of arrays, by part and path."""
    return isinstance(parts, dict) and all(
        isinstance(part, dict) and all(isinstance(x, list) and len(x) == 3 for x in part.values())
        for part in parts.values()
    )


def _fit(stored: dict[str, dict[str, list]], like: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> bool:
    return all(
        {path: x[:2] for path, x in stored.get(name, {}).items()} == {path: _described(x) for path, x in part.items()}
        for name, part in like.items()
    )


def reading_error(folder: Path, error: BaseException | None) -> str | None:
    """Why the system refuses to read the folder, by the error or by reading it again; None when it does not."""
    while error:
        code = getattr(error, "errno", None) or int((re.findall(r"os_error_code='(\d+)'", str(error)) or [0])[0])
        if code and code not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            return os.strerror(code)
        error = error.__cause__ or error.__context__

    def stop(error: OSError) -> None:
        raise error

    try:
        for parent, _, files in os.walk(folder, onerror=stop):
            for file in (Path(parent, name) for name in files):
                if file.is_file():  # to read a pipe would take for ever
                    file.read_bytes()
    except OSError as error:
        return error.strerror
    return None


def existing(folder: Path) -> tuple[list[int], Metadata | None]:
    """Steps of the complete checkpoints and the metadata of the newest. Writes nothing."""
    if not folder.is_dir():
        return [], None
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        steps = checkpoints.steps
        return steps, checkpoints.metadata(steps[-1]) if steps else None


def placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes of arrays with a sharding for each: what `Checkpoints.restore` takes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
