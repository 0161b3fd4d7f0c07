"""What a check finds."""

import dataclasses
from collections.abc import Iterable
from typing import Self

from vit_nabirds.parallel.gpus import GIB


@dataclasses.dataclass(frozen=True)
class Findings:
    """Lines of the report, what has to be put right before the training can run, and what only may go wrong."""

    lines: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, all_of_them: Iterable[Self]) -> Self:
        """Those of several checks, in their order."""
        total = cls()
        for found in all_of_them:
            total.lines.extend(found.lines)
            total.problems.extend(found.problems)
            total.warnings.extend(found.warnings)
        return total

    def verdict(self, ready: str = "ready") -> str:
        """The end of the report: warnings, and then a numbered list of what to fix, or `ready`."""
        warnings = [f"warning: {text}" for text in self.warnings]
        problems = [f"{number}. {text}" for number, text in enumerate(self.problems, 1)]
        return "\n".join([*warnings, *(["to fix:", *problems] if problems else [ready])])


def gib(size: float) -> str:
    if size < GIB / 10:
        return f"{size / 2**20:.3g} MiB"
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def counted(count: int, what: str) -> str:
    """'1 step' or '1,122 steps'."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
