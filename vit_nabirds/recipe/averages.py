"""Averages of parameters: over the steps of a run, and with those that it started from."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def ema(average: dict[str, jax.Array], params: dict[str, jax.Array], decay: float, step: jax.Array) -> dict:
    """The moving average after a step, of the float32 arrays by path that `average` has.

    `params` are those after the step, and `step` (int32 ()) counts the steps before it: 0 at the first. The decay warms
    up, min(decay, (1 + step) / (10 + step)), so that the average soon forgets the parameters before the first step.
    """
    weight = jnp.maximum(1 - decay, 9 / (10 + step.astype(jnp.float32)))  # 1 - the decay, without cancellation
    return {path: mean + weight * (params[path] - mean) for path, mean in average.items()}


def interpolate(pretrained: Mapping[str, jax.Array], tuned: dict[str, jax.Array], share: float) -> dict:
    """(1 - share) * pretrained + share * tuned, by path (WiSE-FT; Wortsman et al., 2022).

    The classifier, and what `pretrained` lacks, are the tuned ones. A share of 0 or 1 gives one of them exactly.
    """
    mixed = {path for path in tuned if path in pretrained and not path.startswith("classifier/")}
    return {path: (1 - share) * pretrained[path] + share * x if path in mixed else x for path, x in tuned.items()}
