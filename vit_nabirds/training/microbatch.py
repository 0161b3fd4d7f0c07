"""How many images a device works on at once, where the configuration leaves it to the program."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax


def largest_that_fits(share: int, fits: Callable[[int], bool], pairs: bool = False) -> int:
    """0, for all of a device's `share` of images at once, if that fits; else the largest power of two that divides the
    share and fits, or the smallest one (2 where `pairs` must stay together)."""
    if fits(0):
        return 0
    sizes = [size for power in range(share.bit_length()) if share % (size := 2**power) == 0 and size < share]
    sizes = sizes[1:] if pairs else sizes
    for size in reversed(sizes):
        if fits(size):
            return size
    return sizes[0] if sizes else 0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs."""

    arguments: int
    working: int
    results: int  # beyond the memory of donated arguments

    @property
    def total(self) -> int:
        return self.arguments + self.working + self.results

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Memory":
        m = compiled.memory_analysis()
        results = m.output_size_in_bytes - m.alias_size_in_bytes
        return cls(m.argument_size_in_bytes, m.temp_size_in_bytes, results)


def memory_of(device: jax.Device) -> int:
    """Bytes that a program can have on a device: what JAX set aside on a GPU; of a CPU's, an equal share for each."""
    if stats := device.memory_stats():
        return stats["bytes_limit"]
    limit = Path("/sys/fs/cgroup/memory.max")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return (machine if allowed == "max" else min(machine, int(allowed))) // jax.local_device_count()
