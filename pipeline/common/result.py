"""Base class of the results that commands return."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """Result of a command, with the keys of its summary as attributes."""

    @property
    def exit_status(self) -> int:
        """Exit status of the command after printing the summary: 0, or 1 if the result reports a failure."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Return the summary that `--json` prints.

        In the printed summary, `seconds` is the time of the whole command, including the import of libraries.
        """
        return asdict(self)
