"""Learning-rate schedule, optimizer, and the parameters they change."""

import re

import optax

from vit_nabirds.config import Config
from vit_nabirds.config.plan import Plan
from vit_nabirds.errors import ConfigError


def trainable_paths(paths: list[str], pattern: str) -> list[str]:
    """The parameter paths in which the regular expression is found; ConfigError if there is none."""
    chosen = [path for path in paths if re.search(pattern, path)]
    if not chosen:
        raise ConfigError(
            f"config.trainable {pattern!r} matches no parameter path; paths look like {', '.join(sorted(paths)[:3])}, …"
        )
    return chosen


def make_schedule(config: Config, plan: Plan) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then cosine or linear decay to 0 at the last step."""
    peak, warmup = config.optimizer.learning_rate, plan.warmup_steps
    if config.optimizer.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, plan.total_steps - warmup)
    else:
        decay = optax.linear_schedule(peak, 0.0, plan.total_steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, or SGD with Nesterov momentum, on parameters by path; weight decay as in PyTorch."""
    c = config.optimizer
    decay = optax.add_decayed_weights(c.weight_decay, mask=_kernels)
    rule = {
        "adamw": (optax.scale_by_adam(), decay),
        "sgd": (decay, optax.trace(decay=c.momentum, nesterov=True)),
    }[c.name]
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        *rule,
        optax.masked(optax.scale(c.head_multiplier), _classifier),
        optax.scale_by_learning_rate(schedule),
    )


def _kernels(params: dict) -> dict[str, bool]:
    return {path: path.endswith("/kernel") for path in params}


def _classifier(params: dict) -> dict[str, bool]:
    return {path: path.startswith("classifier/") for path in params}
