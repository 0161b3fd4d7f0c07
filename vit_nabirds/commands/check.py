"""Say what a training would do and need, and what would go wrong: before it runs, without a device, writing nothing."""

import contextlib
import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vit_nabirds.config import Config
from vit_nabirds.errors import UserError

if TYPE_CHECKING:
    from vit_nabirds.audit.findings import Findings
    from vit_nabirds.audit.slurm import Job
    from vit_nabirds.parallel.gpus import Machines
    from vit_nabirds.parallel.group import ProcessGroup
    from vit_nabirds.training.run import Run

REQUIRED = ()
FLAGS = {
    "workdir": (str, "Folder of the run (default: runs/ and the name of the configuration file)."),
    "gpus": (str, "What it will run on, like '2x4 h100': two nodes with four GPUs each (default: this machine's CPU)."),
    "deep": (False, "Decode every photograph too, and name those that are damaged or have changed since `prepare`."),
    "time": (str, "Time limit of a job as sbatch takes it, like 03:00:00, 90 (minutes) or 1-12 (days-hours)."),
    "images_per_second": (float, "Speed to reckon with (default: that of the run in the workdir, or the GPUs' bound)."),
    "sbatch": ([], "Option of sbatch, like --sbatch=--account=NAME, to ask Slurm about; may be given several times."),
    "accept_changes": (False, "As for train."),
    "from_step": (int, "As for train."),
    "allow_idle_gpus": (False, "As for train."),
}
PARALLEL = False
CONFIGURED = "demo.py"


@dataclasses.dataclass(frozen=True)
class Asked:
    """The training that is to be checked, and the job and machines that it is meant for."""

    config: Config
    workdir: Path
    job: "Job"
    machines: "Machines | None"  # None: the CPU
    is_described: bool  # these can be compiled for
    limit: float | None  # seconds of a job
    options: object
    group: "ProcessGroup"

    @property
    def devices(self) -> int:
        return self.machines.size if self.machines else self.job.devices(self.config.cpu_devices)


def run(options, group) -> int:
    """Leaves JAX without devices other than CPUs, to the end of the process."""
    from vit_nabirds.audit.duration import seconds_of, speed_of
    from vit_nabirds.audit.slurm import Job
    from vit_nabirds.audit.step import share_of_memory
    from vit_nabirds.commands.train import workdir_of
    from vit_nabirds.parallel import gpus
    from vit_nabirds.parallel.preemption import ends_at_once
    from vit_nabirds.training.train import holds_birds, prepare_synthetic

    config, job, workdir = Config.read(options.config), Job.of(options.sbatch), workdir_of(options)
    machines, time = job.machines(options.gpus), options.time or job.options.get("time")
    described = machines is not None and gpus.can_compile()  # which JAX must know before it looks for devices
    asked = Asked(config, workdir, job, machines, described, seconds_of(time) if time else None, options, group)
    speed_of(options.images_per_second, workdir, None)  # a mistake in it is one from the start
    share_of_memory()
    gpus.stay_off_devices(machines.size if machines else config.cpu_devices)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vit-nabirds-check-"))
        stack.enter_context(ends_at_once(lambda: shutil.rmtree(folder, ignore_errors=True)))
        around = findings_around(asked)
        if config.data.synthetic and not holds_birds(Path(config.data.root)):
            prepare_synthetic(Path(folder) / "birds", config.model.image_size)
            config = config.replace({"data.root": str(Path(folder) / "birds")})
            asked = dataclasses.replace(asked, config=config)
        try:
            prepared = prepare(asked)
        except UserError as error:
            return refuse(asked, around, error)
        return check(asked, prepared, around)


def findings_around(asked: Asked) -> "Findings":
    """What can be found without the data and the weights."""
    from vit_nabirds.audit import slurm, storage
    from vit_nabirds.audit.findings import Findings

    job, nodes = asked.job, max(asked.job.nodes, asked.machines.nodes if asked.machines else 1)
    unknown = job.gpus_per_node[0] and not asked.machines
    text = (
        "sbatch's options do not say which GPUs these are, so nothing is known of their memory and speed: add "
        "--gpus=h100, or what they are (to launch/train.sbatch: --check=h100)."
    )
    found = [
        storage.may_write(asked.workdir),
        storage.is_shared(asked.workdir, Path(asked.config.data.root), nodes),
        slurm.of_tasks(job, asked.options.allow_idle_gpus),
        slurm.of_slurm(job),
        Findings(warnings=[text] if unknown else []),
    ]
    return Findings.of(found)


def prepare(asked: Asked) -> "Run":
    """The run, on described GPUs where there are some and their compiler is here. UserError as `train` reports it."""
    import jax

    from vit_nabirds.parallel import devices, gpus
    from vit_nabirds.runs.trackers import check as check_trackers
    from vit_nabirds.training.run import check_batch_size, prepare_run

    config, machines, options = asked.config, asked.machines, asked.options
    check_trackers(config.track)
    check_batch_size(config, asked.devices)  # also where there are fewer CPU devices to compile for
    mesh = None  # as train would make it here
    if machines:
        fsdp = machines.per_node if config.mesh.fsdp == -1 else config.mesh.fsdp
        size = machines.size
        mesh = gpus.mesh_of(machines, fsdp) if asked.is_described else devices.make_mesh(fsdp, jax.devices()[:size])
    with quiet():  # the report says it
        return prepare_run(config, asked.workdir, asked.group, mesh, options.accept_changes, options.from_step)


def refuse(asked: Asked, around: "Findings", error: UserError) -> int:
    """Print all mistakes that can be found beside the first; raise that one if it is alone."""
    from vit_nabirds.audit.findings import Findings
    from vit_nabirds.audit.mistakes import mistakes

    with quiet():
        found = list(mistakes(asked.config, asked.workdir, asked.group, asked.devices, error))
    if len(found) + len(around.problems) == 1:
        raise error
    show([Findings.of([Findings(problems=found), around]).verdict()])
    return error.exit_code


def check(asked: Asked, run: "Run", around: "Findings") -> int:
    """Print the report; returns 0 if the training is ready to start, else 1."""
    from vit_nabirds.audit import pictures, storage, weights
    from vit_nabirds.audit import step as audits
    from vit_nabirds.audit.findings import Findings

    size = run.mesh.size
    cpu = f"the CPU, as {size} device{'s' if size > 1 else ''}"
    show([f"{run.workdir} on {asked.machines if asked.is_described else cpu}", *audits.of_run(run)])
    found = [pictures.of_classes(run), weights.of_weights(run), storage.has_room(run), around]
    show(Findings.of(found).lines)
    found.append(pictures.damaged(run) if asked.options.deep else pictures.missing(run))
    show(found[-1].lines)
    found += step_and_duration(asked, run)
    if asked.machines and not asked.is_described:
        show(["This is the CPU's program: for that of the GPUs, run `make gpu-compile` first (BUILD.md)."])
    total = Findings.of(found)
    show([total.verdict("ready" if run.start < run.plan.total_steps else "ready, but nothing is left to train")])
    return 1 if total.problems else 0


def step_and_duration(asked: Asked, run: "Run") -> "Iterator[Findings]":
    """Compiles the step; its part of the report is shown as it comes."""
    from vit_nabirds.audit import duration
    from vit_nabirds.audit import step as audits
    from vit_nabirds.audit.estimate import Budget
    from vit_nabirds.audit.findings import Findings, gib
    from vit_nabirds.parallel import devices, gpus
    from vit_nabirds.training.microbatch import memory_of

    machines, most = asked.machines, None
    budget = Budget(machines, audits.share_of_memory()) if asked.is_described else None
    available = budget.available if budget else memory_of(devices.own(run.mesh))
    step = audits.audit_of(run, gpus.OPTIONS if budget else None, available)
    show(audits.of_step(run, step))
    if budget:
        lines, problem = audits.judge(run, step, budget)
        yield Findings(problems=[problem] if problem else [])
        show([*audits.of_gpus(run, step, machines), *lines])
        most = run.config.batch_size / audits.bounds_of(run, step, machines).step
    else:
        show([f"memory       {gib(step.used)} of a device"])
    speed = duration.speed_of(asked.options.images_per_second, run.workdir, most)
    found = duration.of_duration(run, speed, asked.limit, asked.job.leave, asked.job.requeues)
    show(found.lines)
    yield found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what a training says as it starts."""
    log = logging.getLogger("vit_nabirds")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def show(lines: Iterable[str]) -> None:
    """At once: a compilation may follow."""
    for line in lines:
        print(line, flush=True)
