"""Evaluations during a training, the selection of its best checkpoint, and the final scores."""

import logging

from vit_nabirds.data.unread import Unread
from vit_nabirds.errors import TransientError, exit_code_of
from vit_nabirds.evaluation.scoring import Scorer, make_eval_step
from vit_nabirds.files import written_whole
from vit_nabirds.parallel.preemption import StopRequest
from vit_nabirds.parallel.watchdog import Watchdog
from vit_nabirds.runs.checkpoints import Checkpoints
from vit_nabirds.runs.selection import PREDICTIONS
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.training.run import Run
from vit_nabirds.training.state import TrainState

log = logging.getLogger("vit_nabirds")


class Evaluator:
    """Scores states on the validation photographs; the checkpoint of the best one is kept.

    Without validation photographs it scores the test photographs, and selects nothing.
    """

    def __init__(
        self,
        run: Run,
        tracker: Tracker,
        checkpoints: Checkpoints,
        stop: StopRequest,
        watchdog: Watchdog,
        is_writer: bool,
    ) -> None:
        self._run, self._tracker, self._checkpoints = run, tracker, checkpoints
        self._stop, self._watchdog, self._is_writer = stop, watchdog, is_writer
        eval_step = make_eval_step(run.model, run.metadata.normalization, run.mesh, run.config.evaluate.views)
        splits = {"val": run.validation_split, "test": run.test_split}
        self._scorers = {
            name: Scorer(
                eval_step, split, Unread(split, run.config.data.tolerated), run.model.num_classes,
                run.config.batch_size, run.mesh, run.taxonomy, run.config.data.workers,
            )
            for name, split in splits.items() if split
        }  # fmt: skip
        self._newest = (0, None)  # step and Scores of the newest evaluation on the test photographs

    def is_behind(self, step: int) -> bool:
        """Whether an evaluation is due at this step and has not come to its end."""
        return self._run.plan.evaluates(step) and step not in self._run.selection.evaluations

    def run(self, step: int, state: TrainState) -> bool:
        """Score the state of a step that has a checkpoint; False if a request to stop came first."""
        selection, split = self._run.selection, "val" if "val" in self._scorers else "test"
        scores = self._scorers[split].score(state.evaluated, self._stop, self._watchdog.waits_for)
        if scores:
            self._newest = (step, scores) if split == "test" else (0, None)
            self._tracker.scalars(step, scores.named(split))
            selection.evaluations[step] = scores.named(split)
            if self._is_writer:
                self._write_selection()
        return scores is not None

    def _write_selection(self) -> None:
        """After every evaluation, so that one that storage refuses may wait for the next."""
        try:
            self._run.selection.write()
        except OSError as error:
            if exit_code_of(error) != TransientError.exit_code:
                raise
            log.warning("%s could not be written (%s)", self._run.selection.file, error.strerror)

    def finish(self, last: int) -> dict | None:
        """Score the selected checkpoint and the last on the test photographs, unless that has been done, and write what
        the selected one answers to predictions.parquet. Returns results.json; None if a request to stop came first."""
        run, selection = self._run, self._run.selection
        if not self._score_unknown():
            return None
        selected, file = selection.best(self._checkpoints.steps), run.workdir / PREDICTIONS
        for step in dict.fromkeys((selected, last)):
            if step in selection.tests:
                continue
            newest, scores = self._newest
            if newest != step:
                params = run.evaluated(self._checkpoints, step)
                if (scores := self._scorers["test"].score(params, self._stop, self._watchdog.waits_for)) is None:
                    return None
                self._tracker.scalars(step, scores.named("test"))
            selection.tests[step] = scores.as_json()
            if self._is_writer:
                if step == selected:
                    test = run.table.with_row_index("row").filter(split="test")
                    table = scores.predictions(test, run.metadata.species)
                    with written_whole(file) as partial:
                        table.write_parquet(partial)
                selection.write()
        return selection.results(selected, last)

    def _score_unknown(self) -> bool:
        """Score the checkpoints whose evaluations are lost on the validation photographs; False if a request to stop
        came first."""
        selection = self._run.selection
        for step in [step for step in selection.unknown if selection.metric]:
            if step not in selection.evaluations:
                params = self._run.evaluated(self._checkpoints, step)
                if (scores := self._scorers["val"].score(params, self._stop, self._watchdog.waits_for)) is None:
                    return False
                selection.evaluations[step] = scores.named("val")
            selection.unknown.remove(step)
        return True
