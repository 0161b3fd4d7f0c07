"""What follows from a configuration and the number of training photographs."""

import dataclasses
import math
from fractions import Fraction
from typing import Self

from vit_nabirds.config.fields import Config
from vit_nabirds.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which steps a run has, counted from 1, and what happens after each."""

    steps_per_epoch: Fraction
    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    evaluate_every: Fraction  # steps, perhaps not whole
    save_every: Fraction | None  # steps; None: by the clock
    save_seconds: float | None  # seconds; None: by steps
    log_every: int
    traced: range  # steps of which the profiler writes a trace

    @classmethod
    def of(cls, config: Config, training_images: int) -> Self:
        """ConfigError for a warm-up, a cool-down or a trace that does not fit the run."""
        steps_per_epoch = Fraction(training_images, config.batch_size)
        total = math.ceil(Fraction(str(config.epochs)) * steps_per_epoch)
        warmup, every = round(config.optimizer.warmup.in_steps(steps_per_epoch)), config.checkpoint.every
        if warmup >= total:
            raise ConfigError(
                f"config.optimizer.warmup is {warmup} steps, but the whole run has {total}: shorten it, as with "
                "--config.optimizer.warmup='0 steps'."
            )
        cooldown = round(config.optimizer.cooldown.in_steps(steps_per_epoch))
        _check_cooldown(cooldown, config.optimizer.schedule, warmup, total)
        if (traced := config.profile.steps).start > total:
            raise ConfigError(
                f"config.profile asks for steps {traced.start}-{traced.stop - 1}, but the run has only {total}."
            )
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            warmup_steps=warmup,
            cooldown_steps=cooldown,
            evaluate_every=config.evaluate.every.in_steps(steps_per_epoch),
            save_every=every.in_steps(steps_per_epoch),
            save_seconds=every.seconds,
            log_every=config.log_every,
            traced=traced,
        )

    def epoch(self, step: int) -> float:
        """Passes over the training photographs at the end of a step."""
        return round(float(step / self.steps_per_epoch), 4)

    def evaluates(self, step: int) -> bool:
        return step > 0 and (step == self.total_steps or _ends_with(step, self.evaluate_every))

    def saves(self, step: int) -> bool:
        """Whether a period in steps ends here; the loop also saves by the clock and where it evaluates or stops."""
        return self.save_every is not None and _ends_with(step, self.save_every)

    def logs(self, step: int) -> bool:
        return step in (1, self.total_steps) or step % self.log_every == 0


def _check_cooldown(cooldown: int, schedule: str, warmup: int, total: int) -> None:
    if cooldown and schedule != "constant":
        raise ConfigError(
            f"config.optimizer.cooldown is {cooldown} steps, but config.optimizer.schedule is {schedule!r}, which "
            "falls to 0 by itself: take the cool-down away, or set the schedule to 'constant'."
        )
    if warmup + cooldown > total:
        raise ConfigError(
            f"config.optimizer.warmup is {warmup} and config.optimizer.cooldown {cooldown} steps, but the whole run "
            f"has {total}: shorten one of them."
        )


def _ends_with(step: int, period: Fraction) -> bool:
    """Whether a period (in steps, perhaps not whole) ends with this step."""
    return step // period > (step - 1) // period
