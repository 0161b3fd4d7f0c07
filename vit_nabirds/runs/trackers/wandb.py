"""Weights & Biases. Its own variables choose server, project and mode: WANDB_MODE=offline writes into the workdir."""

import os
import secrets
from pathlib import Path

import numpy as np

from vit_nabirds.errors import ConfigError
from vit_nabirds.runs.trackers import FINAL, RunInfo, keep_private
from vit_nabirds.runs.trackers.identity import Identity

PATIENCE = 15.0  # seconds for its server, at the start and at the end


class Wandb:
    def __init__(self, info: RunInfo, identity: Identity) -> None:
        wandb = imported()
        if (run := identity.id_of("wandb")) is None:
            identity.keep("wandb", run := secrets.token_hex(4))
        # What it would collect by itself may hold secrets: the address of the git remote, and all that is printed.
        settings = wandb.Settings(
            console="off", disable_git=True, save_code=False, init_timeout=PATIENCE, finish_timeout=PATIENCE
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or info.experiment, id=run, resume="allow", name=info.name,
            dir=info.workdir, config=info.params, settings=settings,
        )  # fmt: skip
        self._image, self._last, self._has_finished = wandb.Image, self._run.step - 1, False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step >= self._last:
            self._run.log(values, step=step)
            self._last = step
        else:  # test figures of the selected checkpoint: its curves only go forwards
            self._run.summary.update(values)
        self._has_finished |= any(name.startswith(FINAL) for name in values)

    def text(self, name: str, markdown: str) -> None:
        Path(self._run.dir, f"{name}.md").write_text(markdown)

    def images(self, name: str, step: int, picture: np.ndarray) -> None:
        self._run.log({name: self._image(picture)}, step=max(step, self._last))

    def close(self) -> None:
        if not self._has_finished:
            self._run.mark_preempting()
        self._run.finish(0 if self._has_finished else 1)


def imported():
    """The package, quiet and without reports of its own."""
    keep_private("WANDB_SILENT")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def check_key() -> None:
    """ConfigError where wandb would ask for a key, or fail without one."""
    wandb = imported()
    if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "config.track has 'wandb', but there is no key for its server: run `wandb login` once, set WANDB_API_KEY, "
            "or set WANDB_MODE=offline to write into the workdir alone."
        )
