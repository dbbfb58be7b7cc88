"""Base class of the results that commands return."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """Result of a command, with the keys of its summary as attributes."""

    @property
    def failed(self) -> bool:
        """Whether the command exits with status 1 after printing the summary."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the summary that `--json` prints.

        In the printed summary, `seconds` is the time of the whole command, including the import of libraries.
        """
        return asdict(self)
