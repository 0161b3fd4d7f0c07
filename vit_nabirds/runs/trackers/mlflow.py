"""MLflow: the server of MLFLOW_TRACKING_URI, or a folder beside the workdirs."""

import os
import time

import numpy as np

from vit_nabirds.runs.trackers import FINAL, RunInfo, keep_private
from vit_nabirds.runs.trackers.identity import Identity

MOST = 500  # characters of a parameter's value that every store takes


class MLflow:
    def __init__(self, info: RunInfo, identity: Identity) -> None:
        # Without a server, mlflow-skinny has only folders to write to.
        keep_private("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE")
        from mlflow.tracking import MlflowClient

        folder = info.workdir.absolute().parent / "mlruns"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or folder.as_uri())
        self._run, self._has_finished = self._resumed(identity.id_of("mlflow")) or self._new(info), False
        if self._run != identity.id_of("mlflow"):
            identity.keep("mlflow", self._run)

    def _resumed(self, run: str | None) -> str | None:
        """None where the server has no such run any more."""
        from mlflow.exceptions import MlflowException

        if run is None:
            return None
        try:
            self._client.update_run(run, status="RUNNING")
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"):
                return None
            raise
        return run

    def _new(self, info: RunInfo) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or info.experiment
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"workdir": str(info.workdir.absolute()), "first_step": str(info.start)}
        run = self._client.create_run(number, run_name=info.name, tags=tags).info.run_id
        params = [Param(field, str(value)[:MOST]) for field, value in info.params.items()]
        for first in range(0, len(params), 100):  # the most that a server takes at once
            self._client.log_batch(run, params=params[first : first + 100])
        return run

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, [Metric(name, float(value), now, step) for name, value in values.items()])
        self._has_finished |= any(name.startswith(FINAL) for name in values)

    def text(self, name: str, markdown: str) -> None:
        self._client.log_text(self._run, markdown, f"{name}.md")

    def images(self, name: str, step: int, picture: np.ndarray) -> None:
        self._client.log_image(self._run, picture, f"{name}.png")

    def close(self) -> None:
        self._client.set_terminated(self._run, "FINISHED" if self._has_finished else "KILLED")
