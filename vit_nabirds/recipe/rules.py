"""What holds for each parameter: its factor on the learning rate, its weight decay, whether it is trained."""

import collections
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

from vit_nabirds.config import Config
from vit_nabirds.config.path_rules import PathRule
from vit_nabirds.errors import ConfigError
from vit_nabirds.models.model import Model


class Rule(NamedTuple):
    """How the optimizer treats one parameter."""

    scale: float  # factor on the learning rate
    decay: float  # weight decay
    frozen: bool


def parameter_rules(config: Config, model: Model) -> dict[str, Rule]:
    """The rule of each parameter by path, in the order of `model.shapes`.

    `trainable`, `lora`, `head_multiplier`, `layer_decay` and `weight_decay` say what holds in general; then the first
    of `optimizer.rules` that matches a path replaces what it names. ConfigError for a pattern that decides nothing, and
    where no parameter would be trained.
    """
    paths = list(model.shapes)
    if not _matching(config.trainable, paths):
        raise _no_match("config.trainable", config.trainable, paths)
    general = {path: _general_rule(config, model, path) for path in paths}
    rules = general | _exceptions(config.optimizer.rules.rules, general)
    if not trained_paths(rules):
        raise ConfigError(
            f"no parameter would be trained: config.trainable {config.trainable!r}, config.optimizer.rules "
            f"{config.optimizer.rules.text!r} and config.lora.rank {config.lora.rank} together freeze them all."
        )
    return rules


def trained_paths(rules: Mapping[str, Rule]) -> list[str]:
    """Paths of the parameters that are trained, in the order of the rules."""
    return [path for path, rule in rules.items() if not rule.frozen]


def describe_rules(rules: Mapping[str, Rule], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """A line for each group of parameters with one rule: how they are trained, how many they are, and where."""
    groups = collections.defaultdict(list)
    for path, rule in rules.items():
        groups[Rule(0, 0, True) if rule.frozen else rule].append(path)
    lines = []
    for rule, paths in groups.items():
        how = "frozen" if rule.frozen else f"learning rate x {rule.scale:.4g}, weight decay {rule.decay:.4g}"
        size = sum(math.prod(shapes[path].shape) for path in paths)
        arrays = f"{len(paths)} array{'s' if len(paths) > 1 else ''}"
        lines.append(f"{how}: {size:,} parameters in {arrays} of {', '.join(_places(paths))}")
    return lines


def _general_rule(config: Config, model: Model, path: str) -> Rule:
    c, in_classifier = config.optimizer, path.startswith("classifier/")
    # The last stage learns at the full rate, each before it slower by the factor, tokens the slowest (BEiT: Bao et al.,
    # 2022).
    scale = c.layer_decay ** (model.num_stages - 1 - model.stage_of(path)) * (c.head_multiplier if in_classifier else 1)
    decay = c.weight_decay if path.endswith(("/kernel", "/lora_a", "/lora_b")) else 0.0
    adapted = not config.lora.rank or in_classifier or "/lora/" in path
    return Rule(scale, decay, frozen=not (adapted and re.search(config.trainable, path)))


def _exceptions(exceptions: Iterable[PathRule], general: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules that differ from the general ones by path; ConfigError for an exception that changes nothing."""
    changed = {}
    for exception in exceptions:
        matching = _matching(exception.pattern, general)
        if not matching:
            raise _no_match("config.optimizer.rules", exception.pattern, general)
        left = {path: general[path] for path in matching if path not in changed}
        if not left:
            raise ConfigError(
                f"config.optimizer.rules: {exception.pattern!r} matches only parameters that the rules before it match "
                f"({_some(matching)}), and the first that matches counts: move it forward, or take it away."
            )
        if not exception.frozen and not trained_paths(left):
            raise ConfigError(
                f"config.optimizer.rules: {exception.pattern!r} matches only parameters that config.trainable or "
                f"config.lora freezes ({_some(left)}): take it away, or train them."
            )
        changed |= {path: _changed(rule, exception) for path, rule in left.items()}
    return changed


def _changed(rule: Rule, exception: PathRule) -> Rule:
    return Rule(
        rule.scale if exception.lr is None else exception.lr,
        rule.decay if exception.wd is None else exception.wd,
        rule.frozen or exception.frozen,
    )


def _matching(pattern: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if re.search(pattern, path)]


def _no_match(field: str, pattern: str, paths: Iterable[str]) -> ConfigError:
    nearest = difflib.get_close_matches(pattern, list(paths), n=3, cutoff=0)
    return ConfigError(f"{field} {pattern!r} matches no parameter path; the nearest are {', '.join(nearest)}.")


def _some(paths: Iterable[str]) -> str:
    """The first paths, in words."""
    first, *rest = paths
    return f"{first} and {len(rest)} more" if rest else first


def _places(paths: Iterable[str]) -> list[str]:
    """Where parameters are, shortly: ['classifier', 'encoder/layers/0-3'] and not each path."""
    places = dict.fromkeys(re.match(r"encoder/layers/\d+|[^/]+", path)[0] for path in paths)
    blocks = sorted(int(place.rpartition("/")[2]) for place in places if "/" in place)
    return [place for place in places if "/" not in place] + [f"encoder/layers/{run}" for run in _runs(blocks)]


def _runs(numbers: list[int]) -> list[str]:
    """[0, 1, 2, 5] -> ['0-2', '5']"""
    runs = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]
