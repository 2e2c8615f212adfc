"""What was skipped on the way through the data, and what is missing and not skipped."""

import itertools
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


class MissingDataError(OSError):
    """A file that was there when the data were opened is missing. To skip it would train another model."""


def missing_data(path: str | Path) -> MissingDataError:
    """The error for a file or folder of this path."""
    return MissingDataError(
        f"'{path}' was there when training began and is missing now; put it back and run the same command again to go "
        "on."
    )


class SkippedRows:
    """Rows and shards that were skipped, each counted and named once.

    Attributes:
        reasons (`dict[str, str]`): Why, by name.
    """

    def __init__(self):
        self.reasons: dict[str, str] = {}
        self._taken = 0

    def note(self, name: str, reason: str):
        """Names what is skipped in the log, where it is new."""
        if name not in self.reasons:
            self.reasons[name] = reason
            logger.warning("Skipped example %d: %s (%s)", len(self.reasons), name, reason)

    def take(self) -> dict[str, str]:
        """What is new since this was last asked: so it gets from a worker to the process that keeps the record."""
        news = dict(itertools.islice(self.reasons.items(), self._taken, None))
        self._taken = len(self.reasons)
        return news


__all__ = ["MissingDataError", "SkippedRows", "missing_data"]
