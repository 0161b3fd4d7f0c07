"""Rules for parameters by their paths, which the configuration has as text."""

import dataclasses
import math
import re
from typing import NamedTuple, Self

from vit_nabirds.errors import ConfigError, shown


class PathRule(NamedTuple):
    """What holds for the parameters in whose path the regular expression is found; None leaves a number as it is."""

    pattern: str
    lr: float | None  # factor on the learning rate
    wd: float | None  # weight decay
    frozen: bool


@dataclasses.dataclass(frozen=True)
class PathRules:
    """Rules in their order, like 'cls_token lr=0.1 wd=0; embeddings frozen'. Written back as the user wrote them."""

    text: str = dataclasses.field(compare=False)
    rules: tuple[PathRule, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """ConfigError for the first rule that is none; TypeError if it is no text."""
        return cls(text, tuple(_rule(part.strip()) for part in re.split(";", text) if part.strip()))

    def __str__(self) -> str:
        return self.text


def _rule(text: str) -> PathRule:
    pattern, *words = text.split()
    given = dict(word.partition("=")[::2] for word in words)
    try:
        re.compile(pattern)
        lr, wd = (float(given[name]) if name in given else None for name in ("lr", "wd"))
        known = words == ["frozen"] or (given and given.keys() <= {"lr", "wd"})
        if (
            known
            and len(given) == len(words)
            and (lr is None or 0 < lr < math.inf)
            and (wd is None or 0 <= wd < math.inf)
        ):
            return PathRule(pattern, lr, wd, "frozen" in given)
    except (re.error, ValueError, OverflowError, RecursionError):
        pass
    raise ConfigError(
        f"config.optimizer.rules has {shown(text)}: each rule is a regular expression without spaces, then "
        "lr=NUMBER above 0, wd=NUMBER of 0 or more, or both, or the word frozen; a semicolon separates two rules."
    )
