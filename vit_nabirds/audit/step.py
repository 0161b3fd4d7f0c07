"""The training step of a run that has not started, compiled and measured against machines."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator

import jax

from vit_nabirds.audit import program
from vit_nabirds.audit.estimate import Bounds, Budget, bounds, largest_batch
from vit_nabirds.audit.findings import gib
from vit_nabirds.audit.program import Collective
from vit_nabirds.errors import ConfigError
from vit_nabirds.parallel.gpus import OPTIONS, Machines
from vit_nabirds.training.microbatch import Memory, largest_that_fits
from vit_nabirds.training.products import flops_of_products
from vit_nabirds.training.run import Run
from vit_nabirds.training.step import is_mixed


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the compiled step says of itself; bytes and operations are those of one device."""

    memory: Memory
    next_batch: int  # bytes of the batch that arrives during a step
    flops: int
    traffic: int
    collectives: list[Collective]
    attentions: tuple[int, int]  # calls of cuDNN's, forwards and backwards
    microbatch: int

    @property
    def used(self) -> int:
        return self.memory.total + self.next_batch

    @property
    def sent(self) -> int:
        return sum(c.bytes for c in self.collectives)


def audit(run: Run, options: dict | None, batch_size: int, microbatch: int) -> Audit:
    """Compile the step of `run`, whose devices may be described ones, with XLA's options and sizes of the batches."""
    traced = run.trace_step(batch_size, microbatch)
    compiled = run.compile_step(traced, options)
    text = compiled.as_text()
    batch = _bytes(run.batch_shapes(batch_size))
    return Audit(
        Memory.of(compiled), batch // run.mesh.size, flops_of_products(traced.jaxpr.jaxpr),
        program.memory_traffic(text), program.collectives(text), program.fused_attentions(text),
        microbatch,
    )  # fmt: skip


def audit_of(run: Run, options: dict | None, available: int) -> Audit:
    """The audit of the run's step; a microbatch of -1 is chosen for so many available bytes."""
    audits = functools.cache(lambda microbatch: audit(run, options, run.config.batch_size, microbatch))
    microbatch = run.config.microbatch
    if microbatch == -1:
        share = run.config.batch_size // run.mesh.size
        microbatch = largest_that_fits(share, lambda size: audits(size).used <= available, is_mixed(run.config))
    return audits(microbatch)


def _bytes(tree: object) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def checkpoint_bytes(run: Run) -> int:
    """On storage; arrays are not compressed."""
    return _bytes(run.state_shapes().parts(run.saved))


def of_run(run: Run) -> Iterator[str]:
    """What is known before anything is compiled: lines of the report."""
    sizes = {path: math.prod(x.shape) for path, x in run.model.shapes.items()}
    config, plan = run.config, run.plan
    trained = sum(sizes[path] for path in run.trainable)
    yield f"data         {run.data_in_words}"
    yield f"model        {sum(sizes.values()):,} parameters, {trained:,} of them trained, in {config.compute_dtype}"
    yield (
        f"run          {plan.total_steps:,} steps of {config.batch_size:,} photographs, from step {run.start:,} on; "
        f"a checkpoint takes {gib(checkpoint_bytes(run))}"
    )


def of_step(run: Run, step: Audit) -> Iterator[str]:
    """What holds of the compiled step on any device."""
    config = run.config
    attention, share = "cuDNN" if sum(step.attentions) else "XLA", config.batch_size // run.mesh.size
    yield f"step         {step.flops / 1e12:.3g} TFLOP in products on each device; attention by {attention}"
    at_once = f"{step.microbatch:,} at once" if step.microbatch else "all at once"
    mesh = " x ".join(map(str, run.mesh.devices.shape))
    yield f"             mesh {mesh} (data x fsdp), {share:,} photographs a device, {at_once}, remat {config.remat}"
    if run.mesh.size == 1:
        yield "collectives  none"
        return
    hidden = sum(c.bytes for c in step.collectives if c.products)
    kinds = sorted({f"{c.dtype} {c.kind}" for c in step.collectives if c.bytes > step.sent / 100})
    waits = "" if all(c.asynchronous for c in step.collectives) else ", not all of them asynchronous"
    yield (
        f"collectives  {len(step.collectives)} ({', '.join(kinds)}), {gib(step.sent)} on each device{waits}; "
        f"{hidden / step.sent:.0%} of it beside matrix products"
    )


def bounds_of(run: Run, step: Audit, machines: Machines) -> Bounds:
    """On these GPUs."""
    state = run.state_shapes()
    changed = _bytes({path: state.params[path] for path in run.trainable}) + _bytes(state.opt_state)
    return bounds(machines, run.config.compute_dtype, step.flops, step.memory.arguments + changed, step.sent)


def of_gpus(run: Run, step: Audit, machines: Machines) -> Iterator[str]:
    """What holds on these GPUs."""
    limits = bounds_of(run, step, machines)
    network = f" at {machines.gpu.network / 1e9:.0f} GB/s for each GPU between nodes" if machines.nodes > 1 else ""
    yield (
        f"time         at least {1e3 * limits.step:.3g} ms a step: products {1e3 * limits.products:.3g}, "
        f"state {1e3 * limits.state:.3g}, links {1e3 * limits.links:.3g} ms{network}"
    )
    yield f"             at most {run.config.batch_size / limits.step:,.0f} images/s"
    yield (
        f"traffic      {gib(step.traffic)} through the kernels of a GPU: "
        f"{1e3 * step.traffic / machines.gpu.bandwidth:.3g} ms if no cache holds any of it"
    )


def share_of_memory() -> float:
    """The part of a GPU's memory that JAX takes; ConfigError if the environment has no number there, or two."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is its name of old
    given = [name for name in names if os.environ.get(name)]
    if len(given) == 2:
        raise ConfigError(f"the environment has both {given[0]} and {given[1]}: JAX takes one of them alone.")
    try:
        share = float(os.environ[given[0]]) if given else 0.75
    except ValueError:
        share = math.nan
    if 0 < share <= 1:
        return share
    raise ConfigError(f"{given[0]} is {os.environ[given[0]]!r}: it must be a number above 0 and up to 1.")


def judge(run: Run, step: Audit, limit: Budget) -> tuple[list[str], str | None]:
    """Lines on the memory of a GPU, and what to change, if anything."""
    config, machines = run.config, limit.machines
    images, fits = config.batch_size // machines.size, step.used <= limit.available
    changes = [] if step.microbatch else ["--config.microbatch=-1"]
    changes += [] if config.remat == "blocks" else ["--config.remat=blocks"]
    changes += [] if run.mesh.shape["fsdp"] >= machines.per_node else ["--config.mesh.fsdp=-1"]
    if step.microbatch:
        most = f"{step.microbatch:,} of them at once"
    else:

        @functools.cache
        def used_with(per_gpu: int) -> int:
            return step.used if per_gpu == images else audit(run, OPTIONS, per_gpu * machines.size, 0).used

        best = largest_batch(used_with, images, limit.available)
        most = f"up to {best:,} fit"
        changes = [f"--config.batch_size={best * machines.size}"] * (best > 0) + changes
    lines = [
        f"memory       {gib(step.used)} of a GPU: {gib(step.memory.arguments)} state and batch, "
        f"{gib(step.memory.working)} working memory, {gib(step.next_batch)} next batch",
        f"             {gib(limit.available)} can be had of {gib(machines.gpu.memory)}: JAX takes "
        f"{100 * limit.share:.3g} % (XLA_CLIENT_MEM_FRACTION), CUDA{' and NCCL' if machines.size > 1 else ''} "
        f"{gib(limit.outside)} or so",
        f"             {images:,} photographs a GPU; {most}",
    ]
    ways = ", ".join(changes or ["a smaller model or image_size"])
    return lines, None if fits else f"the step does not fit: use {ways} or more GPUs."
