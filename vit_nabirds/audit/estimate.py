"""Bounds that follow from a compiled step and the data sheet of a GPU."""

import dataclasses
from collections.abc import Callable

from vit_nabirds.audit.program import Memory
from vit_nabirds.parallel.gpus import GIB, Machines

# CUDA's context, the libraries' own memory, and NCCL's buffers between GPUs. Not measured: round figures, to the safe
# side of what is commonly seen.
CUDA, NCCL = int(1.0 * GIB), int(0.75 * GIB)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of a GPU that a step may use: what JAX sets aside at its start."""

    memory: int  # of the GPU
    share: float  # that JAX takes, XLA_CLIENT_MEM_FRACTION
    outside: int  # for CUDA and NCCL

    @property
    def available(self) -> int:
        return min(int(self.share * self.memory), self.memory - self.outside)


def budget(machines: Machines, share: float) -> Budget:
    return Budget(machines.gpu.memory, share, CUDA + NCCL * (machines.size > 1))


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that a step takes at least."""

    products: float  # at the peak of the GPU
    state: float  # to read and write what the step changes
    links: float  # for each GPU, or each node, to send its gradients once

    @property
    def step(self) -> float:
        """All three overlap at best."""
        return max(self.products, self.state, self.links)


def bounds(machines: Machines, dtype: str, flops: int, memory: Memory, sent: int) -> Bounds:
    """For a step with so many `flops` and bytes `sent` on each GPU."""
    gpu = machines.gpu
    within = sent / gpu.link if machines.per_node > 1 else 0.0
    between = sent / (machines.per_node * gpu.network) if machines.nodes > 1 else 0.0
    return Bounds(flops / gpu.flops[dtype], 2 * memory.arguments / gpu.bandwidth, max(within, between))


def largest_batch(used_with: Callable[[int], int], images: int, available: int) -> int:
    """The largest power of two of images whose step needs no more than the available bytes; 0 if not even one fits."""
    used = used_with(images)
    other = 4 * images if used <= available else max(1, images // 4)
    if other == images:
        return 0
    per_image = (used_with(other) - used) / (other - images)  # memory grows in proportion, but for XLA's own choices
    most = int(images + (available - used) / per_image)
    best = 2 ** (most.bit_length() - 1) if most >= 1 else 0
    return best if best == 0 or used_with(best) <= available else best // 2
