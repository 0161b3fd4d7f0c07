"""The GPUs that a process sees before JAX starts, and which of them are its own."""

import contextlib
import glob
import importlib.metadata
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from vit_nabirds.errors import UserError

# Of AMD's, the second counts among those that the first has left.
VISIBLE = (("CUDA_VISIBLE_DEVICES",), ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))
FILES = ("dev/nvidia[0-9]*", "dev/dri/renderD*")


class Seen(NamedTuple):
    """What a process tells the others before they share the GPUs of their nodes."""

    node: str
    gpus: list[str]  # in the order in which JAX counts them
    allocated: int = 0  # GPUs of the job on this node, by Slurm's account; 0: it does not say


Share = Callable[[list[Seen]], list[list[int] | None]]


def see(node: str, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Seen:
    """The GPUs of this process, by UUID where the driver or the environment has it, else by number."""
    if environ.get("JAX_PLATFORMS") == "cpu":
        return Seen(node, [])
    makers = list(zip(VISIBLE, FILES, strict=True))
    if _on_node(root, FILES[1]) and not glob.glob(str(root / FILES[0])):
        makers.reverse()  # what CUDA may see says nothing of AMD's
    for names, pattern in makers:
        gpus = _on_node(root, pattern)
        for name in names:
            gpus = _visible(gpus, environ[name]) if name in environ else gpus
        if gpus:
            break
    allocated = environ.get("SLURM_GPUS_ON_NODE", "")
    return Seen(node, gpus, int(allocated) if allocated.isdecimal() else 0)


def _on_node(root: Path, pattern: str) -> list[str]:
    """Those whose device files this process may open, which a job's cgroup decides."""
    if pattern.startswith("dev/dri") and not (root / "dev/kfd").exists():
        return []  # a screen's
    files = sorted(map(Path, glob.glob(str(root / pattern))), key=lambda file: int(re.sub(r"\D", "", file.name)))
    uuids = {}
    for file in glob.glob(str(root / "proc/driver/nvidia/gpus/*/information")):
        with contextlib.suppress(OSError):
            text = Path(file).read_text(errors="replace")
            found = dict(re.findall(r"^(GPU UUID|Device Minor):\s*(\S+)", text, re.M))
            uuids["nvidia" + found.get("Device Minor", "?")] = found.get("GPU UUID")
    return [uuids.get(file.name) or file.name for file in files if _may_open(file)]


def _may_open(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_RDWR | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _visible(gpus: list[str], names: str) -> list[str]:
    """Of `gpus`, those that an environment variable leaves: numbers, or UUIDs, which may be cut short."""
    chosen = []
    for name in filter(None, map(str.strip, names.split(","))):
        if name.isdecimal():
            known = [gpus[int(name)]] if int(name) < len(gpus) else [] if gpus else [name]
        else:
            known = [gpu for gpu in gpus if gpu.startswith(name)] or [name] * name.startswith(("GPU-", "MIG-"))
        if len(known) != 1:  # CUDA too stops at the first that is none
            break
        chosen += known
    return chosen


def share(seen: list[Seen], allow_idle: bool = False) -> list[list[int] | None]:
    """For each process the indices of its own among the GPUs that it sees; None: all of them.

    UserError where processes cannot share the GPUs of their node equally, or some of them would be idle.
    """
    shares: list[list[int] | None] = [None] * len(seen)
    for node in dict.fromkeys(process.node for process in seen):
        members = [number for number, process in enumerate(seen) if process.node == node]
        lists = [seen[number].gpus for number in members]
        allocated = max(seen[number].allocated for number in members)
        used = _shares_on(node, members, lists, allow_idle)
        for number, own in zip(members, used, strict=True):
            shares[number] = own
        taken = sum(len(gpus if own is None else own) for gpus, own in zip(lists, used, strict=True))
        if 0 < taken < allocated and len(seen) > 1 and not allow_idle:
            raise UserError(
                f"{allocated - taken} of the {allocated} GPUs of the job on {node} would be idle: ask for as many as "
                "the tasks use, start more tasks, or pass --allow_idle_gpus."
            )
    return shares


def _shares_on(node: str, members: list[int], lists: list[list[str]], allow_idle: bool) -> list[list[int] | None]:
    """The shares of the processes of one node."""
    count, gpus = len(members), lists[0]
    everything = [gpu for seen in lists for gpu in seen]
    if count == 1 or not everything or len(set(everything)) == len(everything) and all(lists):
        return [None] * count
    if without := [number for number, seen in zip(members, lists, strict=True) if not seen]:
        raise UserError(f"process {without[0]} on {node} sees no GPU, but others of the same node do: {_BIND}")
    if any(set(seen) != set(gpus) for seen in lists):
        twice = next(gpu for gpu in everything if everything.count(gpu) > 1)
        both = [number for number, seen in zip(members, lists, strict=True) if twice in seen][:2]
        raise UserError(f"processes {both[0]} and {both[1]} on {node} would share the GPU {twice}: {_BIND}")
    if gpus[0].startswith("MIG-"):
        raise UserError(f"{count} tasks on {node} see the same parts of a GPU, and CUDA gives each the first: {_BIND}")
    if len(gpus) < count or len(gpus) % count and not allow_idle:
        raise UserError(
            f"{count} tasks cannot share the {len(gpus)} GPUs of {node} equally: start one task for each GPU "
            f"(--ntasks-per-node={len(gpus)}) or for each node (--ntasks-per-node=1)."
        )
    each = len(gpus) // count
    order = [[seen.index(gpu) for gpu in gpus] for seen in lists]
    return [order[place][place * each : (place + 1) * each] for place in range(count)]


_BIND = "give each task its own (--gpus-per-task=1), or all tasks of a node the same (--gpus-per-node)."


def check_plugin(gpus: list[str], environ: Mapping[str, str] = os.environ) -> str | None:
    """What to say if JAX cannot use the GPUs that a process sees."""
    if not gpus or environ.get("JAX_PLATFORMS") or importlib.metadata.entry_points(group="jax_plugins"):
        return None
    return (
        f"this process sees {len(gpus)} GPU(s), but JAX has no plug-in for them and would use the CPU: install it "
        "(BUILD.md), or set JAX_PLATFORMS=cpu."
    )
