"""The base of what a command returns."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """The summary of a command, its keys as attributes."""

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as `--json` prints it."""
        return asdict(self)
