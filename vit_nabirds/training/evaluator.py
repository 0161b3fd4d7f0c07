"""Evaluations during a training, and the selection of its best checkpoint."""

from vit_nabirds.evaluation.scoring import make_eval_step, score
from vit_nabirds.parallel.preemption import StopRequest
from vit_nabirds.runs.checkpoints import Checkpoints
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.training.run import Run
from vit_nabirds.training.state import TrainState


class Evaluator:
    """Scores states on the test photographs; the checkpoint of the best one is kept."""

    def __init__(
        self, run: Run, tracker: Tracker, checkpoints: Checkpoints, stop: StopRequest, is_writer: bool
    ) -> None:
        self._run, self._tracker, self._checkpoints = run, tracker, checkpoints
        self._stop, self._is_writer = stop, is_writer
        self._eval_step = make_eval_step(run.model, run.metadata.normalization)

    def is_behind(self, step: int) -> bool:
        """Whether an evaluation is due at this step and has not come to its end."""
        return self._run.plan.evaluates(step) and step not in self._run.selection.evaluations

    def run(self, step: int, state: TrainState) -> bool:
        """Score the state of a step that has a checkpoint; False if a request to stop came first."""
        run, selection = self._run, self._run.selection
        metrics = score(
            self._eval_step, state.params, run.test_split, run.model.num_classes, run.config.batch_size,
            run.config.data.workers, run.mesh, self._stop,
        )  # fmt: skip
        if metrics:
            self._tracker.scalars(step, metrics)
            selection.evaluations[step] = metrics
            if self._is_writer:
                selection.write()
            self._checkpoints.keep = selection.keep([*self._checkpoints.steps, step])
        return metrics is not None
