"""WiSE-FT: parameters between those that a run started from and its own (Wortsman et al., 2022)."""

import dataclasses
import logging

from vit_nabirds.config import Config
from vit_nabirds.errors import ConfigError
from vit_nabirds.evaluation.scoring import Scorer
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.preemption import StopRequest
from vit_nabirds.recipe.averages import interpolate
from vit_nabirds.recipe.rules import parameter_rules, trained_paths
from vit_nabirds.runs.loading import LoadedRun
from vit_nabirds.runs.start import pretrained_of

log = logging.getLogger("vit_nabirds")

AUTO = "auto"
SHARES = tuple(number / 10 for number in range(11))  # among which AUTO chooses


def share_of(text: str) -> float | str:
    """What --wise says: AUTO, or the share of the run's own parameters. ConfigError for anything else."""
    try:
        if text == AUTO or 0 <= float(text) <= 1:
            return text if text == AUTO else float(text)
    except ValueError:
        pass
    raise ConfigError(f"--wise is {text!r}: give a number from 0 (the pretrained weights) to 1 (the run's), or {AUTO}.")


def check_share(share: float | str, run: LoadedRun) -> None:
    """ConfigError for a run that has nothing to mix its parameters with, or nothing to choose the share by."""
    config = run.metadata.config
    if not config["model"]["pretrained"]:
        raise ConfigError("--wise mixes a run's weights with those that it started from, but these were random.")
    whole = Config.read(config)
    if not whole.lora.rank and all(
        path.startswith("classifier/") for path in trained_paths(parameter_rules(whole, run.model))
    ):
        raise ConfigError("--wise mixes the weights that a run has changed, but this one trained the classifier alone.")
    if share == AUTO and not config["data"]["validation"]:
        raise ConfigError(
            f"--wise={AUTO} chooses by the validation photographs, but the run had config.data.validation=0: give a "
            "number."
        )


def mixed(
    run: LoadedRun, share: float | str, validation: Scorer | None, group: ProcessGroup, stop: StopRequest
) -> tuple[LoadedRun, float] | None:
    """The run with parameters of which a share is its own, and that share; the classifier is its own.

    AUTO takes the share with the best figure by which the run selects, scored by `validation`; of equal ones that with
    the smallest loss, then the largest. None after a request to stop.
    """
    pretrained = pretrained_of(run, group)

    def at(share: float, figures: dict[str, float]) -> LoadedRun:
        params = interpolate(pretrained, run.params, share)
        return run if share == 1 else dataclasses.replace(run, params=params, figures=figures, test={})

    if share != AUTO:
        return at(share, {}), share
    found = {}
    for share in reversed(SHARES):
        scores = validation.score(at(share, {}).params, stop)
        if scores is None:
            return None
        found[share] = scores.named("val")
        shown = ("accuracy", "mean_class_accuracy", "loss")
        words = ", ".join(f"{name} {scores.figures[name]:.4f}" for name in shown)
        log.info("share %.1f of the run's own weights: %s on the validation photographs", share, words)
    share = best_share(found, f"val/{run.metadata.config['evaluate']['select']}")
    log.info("chosen: share %.1f", share)
    return at(share, found[share]), share


def best_share(found: dict[float, dict[str, float]], metric: str) -> float:
    """That of the best figure; of equal ones the smallest loss counts, then the largest share."""
    sign = -1 if metric.endswith("loss") else 1
    return max(found, key=lambda share: (sign * found[share][metric], -found[share]["val/loss"], share))
