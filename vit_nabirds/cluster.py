"""Processes, devices and the mesh they form; requests to stop."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request with everything saved; run the same command again to go on


def split_cpu(devices: int) -> None:
    """Let the CPU count as several devices where there is no accelerator; before JAX touches a device."""
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not in_flags and jax.config.jax_num_cpu_devices != devices:
        jax.config.update("jax_num_cpu_devices", devices)


def make_mesh() -> Mesh:
    """All devices of all processes on the one axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's block of a batch -> arrays of the global batch, sharded on `data`."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, block) for name, block in batch.items()}


def is_writer() -> bool:
    """Whether this process is the one that writes logs, events and configuration."""
    return jax.process_index() == 0


class StopRequest:
    """SIGTERM or Ctrl-C while it is entered: `requested` says so, and the work ends at the next safe point.

    A signal more than a second later (sooner, it is the first one on another way) ends the process at once; the last
    complete checkpoint stays as it is.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            os.write(2, b"stopping at the next safe point; a second signal stops at once\n")
        elif time.monotonic() - self._since > 1:
            os._exit(1)

    def next_or_none(self, batches: Iterator[dict]) -> dict | None:
        """The next batch; None at the end, or when a stop is requested."""
        try:
            return None if self.requested else next(batches, None)
        except Exception:
            if self.requested:  # a loader process was still starting, not yet deaf to the signal, and died of it
                return None
            raise
