"""Where a run writes: whether it may, whether there is room, and whether all nodes see it."""

import re
import shutil
import tempfile
from pathlib import Path

from vit_nabirds.audit.duration import ends
from vit_nabirds.audit.findings import Findings, counted, gib
from vit_nabirds.audit.step import checkpoint_bytes
from vit_nabirds.errors import quoted
from vit_nabirds.training.run import Run

MOUNTS = Path("/proc/self/mountinfo")
# Kinds of file systems that one machine has for itself.
LOCAL = re.compile("ext[234]|xfs|btrfs|zfs|f2fs|tmpfs|ramfs|rootfs|overlay|squashfs|erofs|vfat|ntfs3?|fuseblk|apfs|hfs")


def may_write(workdir: Path) -> Findings:
    """Whether files can be made in the workdir, or where it will be; none is left behind."""
    folders = [workdir, *(workdir / name for name in ("checkpoints", "tensorboard", "compiled"))]
    problems = []
    for folder in dict.fromkeys(map(_nearest, folders)):
        try:
            if folder.is_dir():  # a file in the way is reported by itself
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            problems.append(
                f"{quoted(folder)} cannot be written to ({error.strerror}): choose another --workdir, or have that put "
                "right."
            )
    return Findings(problems=problems)


def is_shared(workdir: Path, root: Path, nodes: int) -> Findings:
    """Whether several nodes see the same folders, by the kind of their file systems: a guess."""
    warnings = []
    for name, folder in {"--workdir": workdir, "--config.data.root": root}.items():
        kind = file_system(folder)
        if nodes > 1 and kind and LOCAL.fullmatch(kind):
            warnings.append(
                f"{name}={quoted(folder)} lies on {kind}, which is mostly local to a machine, and the job has "
                f"{nodes} nodes: all of them must see it under this path."
            )
    return Findings(warnings=warnings)


def has_room(run: Run) -> Findings:
    """Whether the checkpoints will find room. A user's quota is not seen."""
    folder, each = _nearest(run.workdir), checkpoint_bytes(run)
    count = most_checkpoints(run)
    free, needed = shutil.disk_usage(folder).free, max(0, count - len(run.saved_steps)) * each
    kind = file_system(run.workdir)
    there = f"{quoted(folder)} ({kind})" if kind else quoted(folder)
    room = f"{gib(count * each)}; {gib(free)} are free in {there}"
    lines = [
        f"storage      up to {counted(count, 'checkpoint')} at a time, {room}",
        f"             {_pack_in_words(run)}",
    ]
    if needed <= free:
        return Findings(lines)
    return Findings(
        lines,
        [
            f"{quoted(folder)} has {gib(free)} free, but the checkpoints need {gib(needed)} more: make room, or choose "
            "another --workdir."
        ],
    )


def most_checkpoints(run: Run) -> int:
    """That lie in the workdir at a time: the two newest and the selected one, and the next while it is written."""
    saved, plan, most = len(run.saved_steps), run.plan, 3 + (run.selection.metric is not None)
    if not run.goes_on:
        return saved
    if plan.save_seconds is None:
        new = sum(ends(period, run.start, plan.total_steps) for period in {plan.evaluate_every, plan.save_every})
        most = min(most, saved + new)
    return max(saved, most)


def _pack_in_words(run: Run) -> str:
    images = [run.train_split.images, run.test_split.images]  # those that are held out are among the training images
    size = sum(3 * each.size**2 * len(each.paths) for each in images)
    if run.train_split.is_packed:
        return f"the data are packed, {gib(size)}"
    root = Path(run.config.data.root)
    return (
        f"the data are not packed: `prepare --pack` would take {gib(size)} of {gib(shutil.disk_usage(root).free)} free"
    )


def file_system(folder: Path) -> str | None:
    """The kind of file system that a folder lies on, like 'ext4' or 'lustre'; None where the system does not say."""
    try:
        lines, best, real = MOUNTS.read_text(errors="replace").splitlines(), ("", None), folder.resolve()
    except OSError:
        return None
    for line in lines:  # '36 35 98:0 /root /mounted\040here rw,noatime master:1 - ext4 /dev/sda1 rw'
        mount, _, rest = line.partition(" - ")
        place = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount.split()[4])
        if real.is_relative_to(place) and len(place) >= len(best[0]):  # the last one mounted there counts
            best = place, rest.split()[0]
    return best[1]


def _nearest(path: Path) -> Path:
    """The path itself, or what exists of it."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
