"""Bounds that follow from a compiled step and the data sheet of a GPU."""

import dataclasses
from collections.abc import Callable

from vit_nabirds.parallel.gpus import GIB, Machines

# CUDA's context, the libraries' own memory, and NCCL's buffers between GPUs. Not measured: round figures, to the safe
# side of what is commonly seen.
CUDA, NCCL = int(1.0 * GIB), int(0.75 * GIB)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes of a GPU that a step may use: what JAX sets aside at its start."""

    machines: Machines
    share: float  # of the memory that JAX takes, XLA_CLIENT_MEM_FRACTION

    @property
    def outside(self) -> int:
        return CUDA + NCCL * (self.machines.size > 1)

    @property
    def available(self) -> int:
        memory = self.machines.gpu.memory
        return min(int(self.share * memory), memory - self.outside)


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


def bounds(machines: Machines, dtype: str, flops: int, moved: int, sent: int) -> Bounds:
    """For a step with so many `flops`, bytes `moved` to and from the memory, and bytes `sent`, all of each GPU."""
    gpu = machines.gpu
    within = sent / gpu.link if machines.per_node > 1 else 0.0
    between = sent / (machines.per_node * gpu.network) if machines.nodes > 1 else 0.0
    return Bounds(flops / gpu.flops[dtype], moved / gpu.bandwidth, max(within, between))


def largest_batch(used_with: Callable[[int], int], images: int, available: int) -> int:
    """So many images of a GPU fit: a power of two, or `images` where that is more; 0 if not even one does."""
    used = used_with(images)
    fits = images if used <= available else 0
    other = 4 * images if fits else max(1, images // 4)
    if other == images:
        return 0
    per_image = max(1.0, (used_with(other) - used) / (other - images))  # in proportion, but for XLA's own choices
    most = min(int(images + (available - used) / per_image), 2**20)
    best = 2 ** (most.bit_length() - 1) if most >= 1 else 0
    while best > fits and used_with(best) > available:
        best //= 2
    return max(best, fits)
