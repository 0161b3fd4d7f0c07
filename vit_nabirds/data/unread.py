"""Photographs that could not be read: each is reported once, and too many of them end the run."""

import logging
from collections.abc import Iterator

import numpy as np

from vit_nabirds.data.batches import Batch
from vit_nabirds.data.photographs import Photographs
from vit_nabirds.errors import UserError, quoted

log = logging.getLogger("vit_nabirds")


class Unread:
    """Those of a split that this process came across. UserError as soon as they are more than a share of it.

    Without a share they are not tolerated: the loader raises an error for the first.
    """

    def __init__(self, photographs: Photographs, most: float | None) -> None:
        self._photographs, self._most, self.rows = photographs, most, set()

    @property
    def are_tolerated(self) -> bool:
        return self._most is not None

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches without `unread`."""
        for batch in batches:
            for row in batch.pop("unread"):
                if row >= 0 and row not in self.rows:
                    self._report(int(row))
            yield batch

    def check(self, count: int, more: str = "") -> None:
        """UserError if so many photographs of the split, of which one is always tolerated, are too many."""
        total = len(self._photographs)
        if count > max(1, (self._most or 0) * total) or count == total:
            raise UserError(
                f"{count} of {total} photographs cannot be read, more than config.data.max_skipped = {self._most:g} of "
                f"them.{more}"
            )

    def _report(self, row: int) -> None:
        self.rows.add(row)
        split, count = self._photographs, len(self.rows)
        index = int(np.searchsorted(split.rows, row))
        try:
            split.read(index, np.empty((split.size, split.size, 3), np.uint8))
            problem = f"{quoted(split.path(index))} could not be read, but can now."
        except UserError as error:
            problem = str(error)
        self.check(count, f" The last: {problem}")
        # As an error: of many processes, only the first reports anything less.
        log.error("%s Left out (%d of %d photographs so far).", problem, count, len(split))
