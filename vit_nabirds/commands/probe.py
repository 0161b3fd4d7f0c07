"""Train the classifier alone on features that are computed once, at several rates, and keep the best as a run."""

import logging
import math
from pathlib import Path

from vit_nabirds.commands.train import experiment_of, next_commands
from vit_nabirds.config import Config
from vit_nabirds.config.fields import flat
from vit_nabirds.errors import ConfigError

log = logging.getLogger("vit_nabirds")

REQUIRED = ("workdir",)
FLAGS = {
    "workdir": (str, "Folder of the run."),
    "learning_rates": (str, "To try, like 0.001,0.01 (default: config.optimizer.learning_rate times 0.03 to 10)."),
    "weight_decays": (str, "To try with each, like 0,0.1 (default: config.optimizer.weight_decay times 0, 1 and 10)."),
}
PARALLEL = True
CONFIGURED = "linear_probe.py"
RATE_FACTORS, DECAY_FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (0.0, 1.0, 10.0)


def run(options, group) -> int:
    from vit_nabirds.parallel.join import check_same_program

    config = Config.read(options.config)
    check_same_program(group, flat(config.to_dict()))
    rates, decays = to_try(config, options.learning_rates, options.weight_decays)
    from vit_nabirds.training.probe import probe
    from vit_nabirds.training.train import FINISHED

    code = probe(config, Path(options.workdir), group, rates, decays, experiment_of(options))
    if code == FINISHED:
        log.info("%s", next_commands(Path(options.workdir), config.data.synthetic))
    return code


def to_try(config: Config, learning_rates: str | None, weight_decays: str | None) -> tuple[list[float], list[float]]:
    """Learning rates and weight decays: those of the flags, by default around the configuration's."""
    rates = [factor * config.optimizer.learning_rate for factor in RATE_FACTORS]
    decays = [factor * config.optimizer.weight_decay for factor in DECAY_FACTORS]
    if learning_rates is not None:
        rates = numbers("learning_rates", learning_rates, least=math.ulp(0))
    if weight_decays is not None:
        decays = numbers("weight_decays", weight_decays, least=0)
    return list(dict.fromkeys(rates)), list(dict.fromkeys(decays))


def numbers(flag: str, text: str, least: float) -> list[float]:
    """'0.1,1' -> [0.1, 1.0]; ConfigError for text that is not numbers, or not in [least, infinity)."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value < math.inf for value in values):
        what = "numbers of 0 or more" if least == 0 else "positive numbers"
        raise ConfigError(f"--{flag} is {text!r}: give {what}, separated by commas.")
    return values
