"""Learning-rate schedule, optimizer, and which parameters they touch."""

import re
from fractions import Fraction

import ml_collections
import numpy as np
import optax

from vit_nabirds.config.fields import Duration
from vit_nabirds.errors import UserError


def trainable_paths(paths: list[str], pattern: str) -> list[str]:
    """The parameter paths in which the regular expression is found; UserError when there is none."""
    chosen = [path for path in paths if re.search(pattern, path)]
    if not chosen:
        raise UserError(
            f"config.trainable {pattern!r} matches no parameter path; paths look like {', '.join(sorted(paths)[:3])}, …"
        )
    return chosen


def make_schedule(config: ml_collections.ConfigDict, total_steps: int, steps_per_epoch: Fraction) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then cosine or linear decay to 0 at the last step."""
    peak = config.optimizer.learning_rate
    warmup = round(Duration.parse(config, "optimizer.warmup").in_steps(steps_per_epoch))
    if warmup >= total_steps:
        raise UserError(f"config.optimizer.warmup is {warmup} steps, but the whole run has {total_steps}: shorten it.")
    decay_steps = total_steps - warmup
    if config.optimizer.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps)
    else:
        decay = optax.linear_schedule(peak, 0.0, decay_steps)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW or SGD with Nesterov momentum (PyTorch's form of weight decay in each) on a flat dict of parameters."""
    c = config.optimizer

    def is_decayed(params: dict) -> dict:
        return {path: path.endswith("/kernel") for path in params}

    def is_classifier(params: dict) -> dict:
        return {path: path.startswith("classifier/") for path in params}

    decay = optax.add_decayed_weights(c.weight_decay, mask=is_decayed)
    rule = {
        "adamw": (optax.scale_by_adam(), decay),
        "sgd": (decay, optax.trace(decay=c.momentum, nesterov=True)),
    }[c.name]
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        *rule,
        optax.masked(optax.scale(c.head_multiplier), is_classifier),
        optax.scale_by_learning_rate(schedule),
    )


def count(params: dict[str, np.ndarray]) -> int:
    """Number of parameters."""
    return sum(int(np.prod(x.shape)) for x in params.values())
