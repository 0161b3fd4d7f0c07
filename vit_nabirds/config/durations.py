"""Configuration values that are written as text: durations and ranges of steps."""

import dataclasses
import re
from fractions import Fraction
from typing import Self

CLOCK = "'500 steps', '1 epoch' or '10 minutes'"
NUMBER = "[0-9]{1,12}"  # longer ones overflow where a float is made of them
STEPS = "'500 steps' or '1 epoch'"


@dataclasses.dataclass(frozen=True)
class Duration:
    """An amount of steps, epochs or minutes. Written back as the user wrote it."""

    text: str = dataclasses.field(compare=False)
    amount: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """ValueError if the text is no duration; TypeError if it is no text."""
        match = re.fullmatch(rf"\s*({NUMBER}|{NUMBER}\.[0-9]{{1,12}}(?!\s*step))\s*(step|epoch|minute)s?\s*", text)
        if not match:
            raise ValueError(text)
        return cls(text, Fraction(match[1]), match[2])

    def in_steps(self, steps_per_epoch: Fraction) -> Fraction | None:
        """Steps, perhaps not whole; None for minutes."""
        return {"step": self.amount, "epoch": self.amount * steps_per_epoch, "minute": None}[self.unit]

    @property
    def seconds(self) -> float | None:
        """None for steps and epochs."""
        return 60 * float(self.amount) if self.unit == "minute" else None

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class StepRange:
    """Steps from the first to the last, both counted; '10-12', or '' for none."""

    text: str
    steps: range

    @classmethod
    def parse(cls, text: str) -> Self:
        """ValueError if the text is no range of steps from 1 on; TypeError if it is no text."""
        match = re.fullmatch(f"({NUMBER})-({NUMBER})", "1-0" if text == "" else text)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if first < 1 or (text and last < first):
            raise ValueError(text)
        return cls(text, range(first, last + 1))

    def __str__(self) -> str:
        return self.text
