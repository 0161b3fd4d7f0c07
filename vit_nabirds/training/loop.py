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
    """Train from the run's start to its end or until it has converged, diverged or been asked to stop. Returns the last
    step, which is saved."""
    plan, mesh, step = run.plan, run.mesh, run.start
    # A run that was stopped between a checkpoint and its evaluation owes the evaluation. False: stopped again.
    stopping = evaluator.is_behind(step) and not evaluator.run(step, state)
    if step < plan.total_steps and not (stopping or run.has_converged):
        batch = devices.to_devices(next(batches), mesh)  # the loader goes on while the step is compiled
        with stop.waits_for("the compilation"):
            train_step = run.compile_step()
        reporter.restart(step)

    while step < plan.total_steps and not (stopping or run.has_converged):
        step += 1
        # Queued before the step, so that the answer is there when the host reads it.
        votes = devices.any_process(mesh, stop.requested, saver.is_overdue())
        with tracer.step(step):
            state, metrics = train_step(state, batch)  # donates the old state
        if step < plan.total_steps:  # while the devices work on this step
            with reporter.waiting_for_input():
                batch = devices.to_devices(next(batches), mesh)
        reporter.add(step, metrics)  # reports the step before, so that the devices always have work
        tracer.end(step, metrics)
        stopping, overdue = np.asarray(votes)
        stopping |= reporter.has_diverged

        if plan.saves(step) or plan.evaluates(step) or overdue or stopping:  # the last step is always evaluated
            reporter.flush()
            saver.save(step, state)
        if plan.evaluates(step) and not stopping:
            stopping = not evaluator.run(step, state)
            reporter.restart(step)
    return step
