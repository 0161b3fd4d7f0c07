"""The training loop."""

from collections.abc import Iterator

import numpy as np

from vit_nabirds.parallel import devices
from vit_nabirds.parallel.preemption import StopRequest
from vit_nabirds.training.evaluator import Evaluator
from vit_nabirds.training.reporter import Reporter
from vit_nabirds.training.run import Run
from vit_nabirds.training.saver import Saver
from vit_nabirds.training.state import TrainState
from vit_nabirds.training.tracer import Tracer


def fit(
    run: Run,
    state: TrainState,
    batches: Iterator[dict[str, np.ndarray]],
    reporter: Reporter,
    saver: Saver,
    evaluator: Evaluator,
    tracer: Tracer,
    stop: StopRequest,
) -> int:
    """Train from the run's start to its end, or to the step after which a stop was requested: the last step, saved."""
    plan, mesh, step = run.plan, run.mesh, run.start
    # A run that was stopped between a checkpoint and its evaluation owes the evaluation.
    stopping = evaluator.is_behind(step) and not evaluator.run(step, state)
    if step < plan.total_steps and not stopping:
        batch = devices.to_devices(next(batches), mesh)  # the loader goes on while the step is compiled
        train_step = reporter.compile(run, stop)

    while step < plan.total_steps and not stopping:
        # The devices answer after the step before this one, so the host reads the answer without waiting for them.
        votes = devices.any_process(mesh, stop.requested, saver.is_overdue())
        with tracer.step(step + 1):
            state, metrics = train_step(state, batch)
        step += 1
        if step < plan.total_steps:  # while the devices work on this step
            with reporter.waiting_for_input():
                batch = devices.to_devices(next(batches), mesh)
        reporter.add(step, metrics)  # reports the step before, so that the devices always have work
        tracer.end(step, metrics)
        stopping, overdue = np.asarray(votes)

        if plan.saves(step) or plan.evaluates(step) or overdue:
            reporter.flush()
            saver.save(step, state)
            if plan.evaluates(step) and not stopping:
                stopping = not evaluator.run(step, state)

    reporter.flush()
    if saver.saved_step != step:
        saver.save(step, state)
    return step
