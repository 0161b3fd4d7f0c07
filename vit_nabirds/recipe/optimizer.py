"""Learning-rate schedule and optimizer."""

import math
import re
from collections.abc import Mapping

import jax
import optax

from vit_nabirds.config import Config
from vit_nabirds.config.plan import Plan
from vit_nabirds.recipe.rules import Rule


def make_schedule(config: Config, plan: Plan) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then cosine or linear decay to 0 at the last step; or 'constant'.

    A constant rate stays at the peak until the cool-down, a linear decay to 0 at the last step (Hägele et al., 2024).
    """
    peak, warmup, cooldown = config.optimizer.learning_rate, plan.warmup_steps, plan.cooldown_steps
    rest = plan.total_steps - warmup
    schedule = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "constant": lambda: optax.linear_schedule(peak, 0.0, cooldown, transition_begin=rest - cooldown),
    }[config.optimizer.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), schedule], [warmup]) if warmup else schedule


def make_optimizer(config: Config, schedule: optax.Schedule, rules: Mapping[str, Rule]) -> optax.GradientTransformation:
    """The update of trained parameters by path: -schedule * scale * (direction + decay * parameter).

    SGD takes the decay into its momentum, as PyTorch does; the others decouple it. Lion (Chen et al., 2023) takes steps
    of equal size, for which a learning rate is 3 to 10 times smaller than AdamW's.
    """
    c, dtype = config.optimizer, _moment_dtype(config)
    decay = optax.stateless(lambda updates, params: _decayed(updates, params, rules))
    direction = {
        "adamw": (optax.scale_by_adam(mu_dtype=dtype), decay),
        "sgd": (decay, optax.trace(decay=c.momentum, nesterov=True, accumulator_dtype=dtype)),
        "lion": (optax.scale_by_lion(mu_dtype=dtype), decay),
        "muon": (_muon(dtype), decay),
    }[c.name]
    # Neither these parts' number nor their order may change: checkpoints hold their states by number.
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        *direction,
        optax.stateless(lambda updates, params: _scaled(updates, rules)),
        optax.scale_by_learning_rate(schedule),
    )


def _moment_dtype(config: Config) -> str | None:
    """None is the parameters' own type, float32, for which optax then adds no conversions."""
    return None if config.optimizer.moment_dtype == "float32" else config.optimizer.moment_dtype


def _decayed(updates: dict, params: dict, rules: Mapping[str, Rule]) -> dict:
    return {path: u + rules[path].decay * params[path] if rules[path].decay else u for path, u in updates.items()}


def _scaled(updates: dict, rules: Mapping[str, Rule]) -> dict:
    return {path: rules[path].scale * u if rules[path].scale != 1 else u for path, u in updates.items()}


def _muon(moment_dtype: str | None) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for the matrices of the blocks, and Adam for all else.

    Muon's directions have about the mean square of Adam's, 0.2², so that one learning rate and one weight decay serve
    both (Liu et al., 2025).
    """
    muon = optax.chain(
        optax.contrib.scale_by_muon(mu_dtype=moment_dtype, weight_dimension_numbers=_matrices),
        optax.stateless(lambda updates, _: jax.tree.map(_as_large_as_adams, updates, _matrices(updates))),
    )
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(mu_dtype=moment_dtype)}, _muon_or_adam)


def _muon_or_adam(params: dict) -> dict[str, str]:
    is_matrix = re.compile(r"encoder/layers/\d+/.*/kernel").fullmatch
    return {path: "muon" if is_matrix(path) else "adam" for path in params}


def _matrices(updates: dict) -> dict:
    """As which matrix, input x output, the array of each path is seen; paths that Adam has keep their MaskedNode."""

    def matrix(path: str, x: jax.Array) -> optax.contrib.MuonDimensionNumbers:
        inputs = 2 if path.endswith("attn/out/kernel") else 1  # (heads, width, hidden); the others have one input axis
        return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, x.ndim)))

    return {path: x if isinstance(x, optax.MaskedNode) else matrix(path, x) for path, x in updates.items()}


def _as_large_as_adams(update: jax.Array, matrix: optax.contrib.MuonDimensionNumbers) -> jax.Array:
    fans = (math.prod(update.shape[axis] for axis in axes) for axes in matrix)
    return 0.2 * math.sqrt(max(fans)) * update
