"""Traces of chosen steps for TensorBoard's profiler or Perfetto."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax


class Tracer:
    """Traces the steps of a range into a folder; the annotations of the other steps cost nothing."""

    def __init__(self, steps: range, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._trace = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of a step."""
        if self._steps and step == self._steps.start:
            self._trace.enter_context(jax.profiler.trace(self._folder))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def end(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Write the trace after its last step, for whose metrics it waits."""
        if self._steps and step == self._steps.stop - 1:
            jax.block_until_ready(metrics)
            self._trace.close()

    def close(self) -> None:
        self._trace.close()
