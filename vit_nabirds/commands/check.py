"""Say what a training would do and need on described GPUs, before it runs: no device is used, nothing is written."""

import contextlib
import shutil
import tempfile
from pathlib import Path

from vit_nabirds.config import Config

REQUIRED = ()
FLAGS = {
    "workdir": (str, "Folder of the run (default: runs/ and the name of the configuration file)."),
    "gpus": (str, "What it will run on, like '2x4 h100': two nodes with four GPUs each (default: this machine's CPU)."),
}
PARALLEL = False
CONFIGURED = "demo.py"


def run(options, group) -> int:
    """Leaves JAX without devices other than CPUs, to the end of the process."""
    from vit_nabirds.audit.step import share_of_memory
    from vit_nabirds.commands.train import workdir_of
    from vit_nabirds.parallel import gpus
    from vit_nabirds.parallel.preemption import ends_at_once
    from vit_nabirds.training.run import check_batch_size
    from vit_nabirds.training.train import holds_birds, prepare_synthetic

    config = Config.read(options.config)
    machines = None if options.gpus is None else gpus.parse(options.gpus)
    if machines:  # also where there are fewer CPU devices to compile for
        check_batch_size(config, machines.size)
    share_of_memory()
    described = machines is not None and gpus.can_compile()
    gpus.stay_off_devices(machines.size if machines else config.cpu_devices)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vit-nabirds-check-"))
        stack.enter_context(ends_at_once(lambda: shutil.rmtree(folder, ignore_errors=True)))
        if config.data.synthetic and not holds_birds(Path(config.data.root)):
            prepare_synthetic(Path(folder) / "birds", config.model.image_size)
            config = config.replace({"data.root": str(Path(folder) / "birds")})
        return check(config, workdir_of(options), group, machines, described)


def check(config: Config, workdir: Path, group, machines, described: bool) -> int:
    """Print the report; returns 0 if the training is ready to start, else 1."""
    import jax

    from vit_nabirds.audit import step as audits
    from vit_nabirds.audit.estimate import Budget
    from vit_nabirds.parallel import devices, gpus
    from vit_nabirds.runs.trackers import check as check_trackers
    from vit_nabirds.training.microbatch import memory_of
    from vit_nabirds.training.run import prepare_run

    check_trackers(config.track)
    mesh = None  # as train would make it here
    if machines:
        fsdp = machines.per_node if config.mesh.fsdp == -1 else config.mesh.fsdp
        mesh = gpus.mesh_of(machines, fsdp) if described else devices.make_mesh(fsdp, jax.devices()[: machines.size])
    run = prepare_run(config, workdir, group, mesh)
    limit = Budget(machines, audits.share_of_memory()) if described else None
    available = limit.available if limit else memory_of(devices.own(run.mesh))
    step = audits.audit_of(run, gpus.OPTIONS if described else None, available)
    size, problem = run.mesh.size, None
    cpu = f"the CPU, as {size} device{'s' if size > 1 else ''}"
    print(f"{workdir} on {machines if described else cpu}")
    for line in audits.of_run(run, step):
        print(line)
    if described:
        lines, problem = audits.judge(run, step, limit)
        print("\n".join([*audits.of_gpus(run, step, machines), *lines]))
    else:
        print(f"memory       {audits.gib(step.used)} of a device")
    if machines and not described:
        print("This is the CPU's program: for that of the GPUs, run `make gpu-compile` first (BUILD.md).")
    print(problem or ("ready" if run.start < run.plan.total_steps else "ready, but nothing is left to train"))
    return 1 if problem else 0
