"""Checkpoints of a run: written in the background with Orbax, the newest and the best kept."""

import collections
import contextlib
import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from vit_nabirds.models.normalization import Normalization
from vit_nabirds.errors import UserError


@dataclasses.dataclass(frozen=True)
class About:
    """What a checkpoint needs to be used without its data set."""

    config: dict
    architecture: dict  # arguments of VisionTransformer
    species: list[str]  # by label
    normalization: Normalization
    fingerprint: str  # of the data

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "About":
        normalization = Normalization(*(tuple(values) for values in fields["normalization"].values()))
        return cls(**fields | {"normalization": normalization})


class Checkpoints:
    """The folder `checkpoints` of a run.

    The two newest are kept (should the machine die while one is being written, the other is whole) and the best:
    `best_step` is told after each evaluation, which follows the save that it judges.
    """

    def __init__(self, folder: Path, read_only: bool = False):
        self.best_step: int | None = None
        self.unknown: list[int] = []  # steps of checkpoints that may be better than the best one that is known
        self._saving = None  # Orbax's response of the save under way
        self._orbax = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=self,
            cleanup_tmp_directories=not read_only,
        )

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's PreservationPolicy."""
        newest = [checkpoint.step for checkpoint in checkpoints][-2:]
        return [checkpoint.step in (*newest, self.best_step, *self.unknown) for checkpoint in checkpoints]

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, state: dict, about: About) -> None:
        """Copy the state and return; it is written in the background and shows when it is complete."""
        training = {name: part for name, part in state.items() if name != "params"}
        parts = {"params": state["params"], "training": training}
        vectors = _vectors(parts)
        arrays = {name: layout(part) for name, part in parts.items()}
        metadata = about.to_json() | {"arrays": arrays, "checksums": checksums(vectors)}
        options = ocp.Context()
        options.array.saving.use_compression = False  # it doubles the time of writing, which steps pay for
        options.array.saving.storage_options.chunk_byte_size = 2**26
        options.array.saving.array_metadata_store = None
        self._finish()
        with options:
            self._saving = self._orbax.save_checkpointables_async(step, vectors, custom_metadata=metadata)

    def _finish(self) -> None:
        """Wait for the save under way: only its result ends the thread and the event loop that Orbax gave it."""
        if self._saving:
            saving, self._saving = self._saving, None
            saving.result()

    def about(self, step: int) -> About:
        try:
            fields = dict(self._orbax.checkpointables_metadata(step).custom_metadata)
            return About.from_json({name: fields[name] for name in fields.keys() - {"arrays", "checksums"}})
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise self._unusable(step, error) from error

    def restore(self, step: int, like: dict) -> dict:
        """The state of a step, or its `params` alone, as the tree `like` of ShapeDtypeStruct with shardings says."""
        training = {name: part for name, part in like.items() if name != "params"}
        parts = {"params": like["params"]} | ({"training": training} if training else {})
        metadata = self._orbax.checkpointables_metadata(step).custom_metadata
        if any(metadata.get("arrays", {}).get(name) != layout(part) for name, part in parts.items()):
            raise UserError(
                f"{self._orbax.directory / str(step)} was written by another version of this program: go on with that "
                "version, or use another --workdir."
            )
        sharding = jax.tree.leaves(like)[0].sharding
        try:
            vectors = self._orbax.load_checkpointables(step, placed(jax.eval_shape(_vectors, parts), sharding))
        except (ValueError, KeyError, OSError) as error:
            raise self._unusable(step, error) from error
        if any(metadata["checksums"][name] != sums for name, sums in checksums(vectors).items()):
            raise self._unusable(step)
        loaded = _trees(jax.tree.map(np.asarray, vectors), parts)
        return {"params": loaded["params"], **loaded.get("training", {})}

    def _unusable(self, step: int, error: BaseException | None = None) -> UserError:
        """What to say of a checkpoint that failed to load: damaged is only what was read and found wrong."""
        folder = self._orbax.directory / str(step)
        if reason := reading_error(folder, error):
            return UserError(
                f"{folder} cannot be read ({reason}): that does not mean that it is damaged. Keep it, and run the same "
                "command again when the storage answers."
            )
        return UserError(f"{folder} is damaged: delete that folder to go on from the checkpoint before it.")

    def close(self) -> None:
        """Wait until what is being written is complete."""
        try:
            self._finish()
        finally:
            self._orbax.close()


def layout(tree: dict) -> dict[str, dict]:
    """Where every array of a tree lies in the vector of its dtype: in one or two long vectors a checkpoint costs a
    third of the processor's time that it does in hundreds of arrays."""
    arrays, ends = {}, collections.Counter()
    for path, array in jax.tree.leaves_with_path(tree):
        dtype = str(array.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        arrays[name] = {"dtype": dtype, "start": ends[dtype], "shape": list(array.shape)}
        ends[dtype] += array.size
    return arrays


@jax.jit
def _vectors(parts: dict[str, dict]) -> dict[str, dict[str, jax.Array]]:
    """{part: {dtype: vector}}, as `layout` says."""
    vectors = {}
    for name, part in parts.items():
        by_dtype = collections.defaultdict(list)
        for array in jax.tree.leaves(part):
            by_dtype[str(array.dtype)].append(array.ravel())
        vectors[name] = {dtype: jnp.concatenate(arrays) for dtype, arrays in by_dtype.items()}
    return vectors


@jax.jit
def _sums(vectors: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    def sums(vector: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(vector, jnp.dtype(f"uint{8 * vector.dtype.itemsize}")).astype(jnp.uint32)
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * odd, dtype=jnp.uint32)])

    return jax.tree.map(sums, vectors)


def checksums(vectors: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, list[int]]]:
    """{part: {dtype: two sums of the bits}}: a file system may give back what was not written."""
    return jax.tree.map(lambda sums: np.asarray(sums).tolist(), _sums(vectors))


def _trees(vectors: dict[str, dict[str, np.ndarray]], like: dict[str, dict]) -> dict[str, dict]:
    """The inverse of `_vectors`, on the devices; the host cuts them up, for hundreds of slices compile long."""
    trees = {}
    for name, part in like.items():
        arrays = []
        for where, leaf in zip(layout(part).values(), jax.tree.leaves(part), strict=True):
            values = vectors[name][where["dtype"]][where["start"] :][: leaf.size].reshape(leaf.shape)
            arrays.append(jax.make_array_from_callback(leaf.shape, leaf.sharding, values.__getitem__))
        trees[name] = jax.tree.unflatten(jax.tree.structure(part), arrays)
    return trees


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
            for file in files:
                Path(parent, file).read_bytes()
    except OSError as error:
        return error.strerror
    return None


def newest(folder: Path) -> tuple[list[int], About] | None:
    """Steps of the complete checkpoints and the description of the newest; None when there is none. Writes nothing."""
    if not folder.is_dir():
        return None
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        return (checkpoints.steps, checkpoints.about(checkpoints.steps[-1])) if checkpoints.steps else None


def placed(tree: dict, sharding: jax.sharding.Sharding) -> dict:
    """The shapes of a state, every array on `sharding`: what `Checkpoints.restore` takes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def write_json(file: Path, value: dict) -> None:
    """Write the whole file or nothing."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(file)
