"""The manifest, which lists the files of a finished cache and is written last, and the plan of unfinished parts."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cache.files import write_atomically
from cache.format import PART_NAME, check_head, head_sha256, sealed_name
from cache.hdf5 import check_regular_file, read_error
from cache.spec import FORMAT_VERSION, CacheError, CacheSpec, DamagedFileError

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
TEXT_NAME = re.compile(r"text-([A-Za-z0-9][A-Za-z0-9_-]*)-[0-9a-f]{12}\.h5")
ATTACHMENT_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)\.(jsonl|h5)")
ATTACHMENT_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*-[0-9a-f]{12}\.(jsonl|h5)")
ATTACHMENT_TEMPORARY = "attachment.tmp"
"""Name of an attachment while it is written."""
_FORMAT = "blip2-query-features"
_CHECKSUMMED = re.compile(rb'(\{.*),\n  "sha256": "([0-9a-f]{64})"\n\}\n', re.DOTALL)


@dataclass(frozen=True)
class PartEntry:
    """Entry of one sealed part, to check its file before HDF5 opens it."""

    file: str
    rows: int
    head_bytes: int
    """Size of the file without its features."""
    head_sha256: str

    def __post_init__(self) -> None:
        """Check the values."""
        _require_counts(self.file, rows=self.rows, head_bytes=self.head_bytes)
        _require_sha256(self.file, self.head_sha256)

    def size(self, row_bytes: int) -> int:
        """Return the size of the file in bytes."""
        return self.head_bytes + self.rows * row_bytes

    def check(self, folder: Path, row_bytes: int) -> None:
        """Raise CacheError if the file is missing, truncated, or its head is damaged."""
        check_head(folder / self.file, self.head_bytes, self.head_sha256, self.size(row_bytes))


@dataclass(frozen=True)
class TextEntry:
    """Entry of the text of one split, whose file name contains the first digits of its digest."""

    file: str
    questions: int
    sha256: str

    def __post_init__(self) -> None:
        """Check the values."""
        _require_sha256(self.file, self.sha256)


def _require_counts(file: str, **values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CacheError(f"{file}: {name} is {value!r}, must be an integer from 1 to {(1 << 31) - 1}")


def _require_sha256(file: str, value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise CacheError(f"{file}: {value!r} is not a SHA-256 of 64 hex digits")


def attachment_file(name: str, sha256: str) -> str:
    """Return the file name of an attachment, which contains its digest so that no file is ever replaced.

    Raises:
        CacheError: The name is not allowed for an attachment.
    """
    found = ATTACHMENT_NAME.fullmatch(name)
    if not found:
        raise CacheError(
            f"{name!r} is not allowed as the name of an attachment: use letters, digits, _ and -, then .jsonl or .h5"
        )
    _require_sha256(name, sha256)
    return f"{found[1]}-{sha256[:12]}.{found[2]}"


@dataclass(frozen=True)
class Manifest:
    """The contents of a finished cache.

    Raises:
        CacheError: A file name is not one of a cache.
    """

    spec: CacheSpec
    part_rows: int
    """Rows per full part, as configured for the last writer."""
    parts: list[PartEntry]
    """In the order in which the rows of the cache are numbered."""
    rows: int
    """Number of stored rows; parts may have more."""
    splits: dict[str, TextEntry]
    attachments: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each further file by name; its file name is `attachment_file`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Origin of the contents, as JSON; the cache does not check it."""

    def __post_init__(self) -> None:
        """Check all file names."""
        for part in self.parts:
            found = PART_NAME.fullmatch(part.file)
            if not found or found[2]:
                raise CacheError(f"{part.file!r} is not the name of a sealed part inside the cache's folder")
        for split, text in self.splits.items():
            named = TEXT_NAME.fullmatch(text.file)
            if not named or named[1] != split:
                raise CacheError(f"{text.file!r}, text of split {split!r}, is not an allowed file name")
        for name, sha256 in self.attachments.items():
            attachment_file(name, sha256)

    @property
    def part_bytes(self) -> int:
        """Size of all parts in bytes."""
        return sum(part.size(self.spec.row_bytes) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the contents, wherever the folder is.

        Covers the spec, the text and the heads of the parts, which contain image digests and CRCs of the features.
        """
        contents = {
            "spec": self.spec.to_attributes(),
            "parts": [part.head_sha256 for part in self.parts],
            "splits": {split: text.sha256 for split, text in sorted(self.splits.items())},
        }
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write or replace the manifest atomically. Raises OSError."""
        content = {
            "spec": self.spec.to_attributes(),
            "part_rows": self.part_rows,
            "parts": [asdict(part) for part in self.parts],
            "rows": self.rows,
            "splits": {split: asdict(text) for split, text in self.splits.items()},
            "attachments": self.attachments,
            "provenance": self.provenance,
        }
        _save_checksummed(folder / MANIFEST_NAME, content)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Load the manifest of `folder`. Raises FileError if it is unreadable, damaged or of another version."""
        path = folder / MANIFEST_NAME
        content = _load_checksummed(path)
        with _content_errors(path):
            return cls(
                spec=CacheSpec.from_attributes(content["spec"]),
                part_rows=int(content["part_rows"]),
                parts=[PartEntry(**part) for part in content["parts"]],
                rows=int(content["rows"]),
                splits={split: TextEntry(**text) for split, text in content["splits"].items()},
                attachments=dict(content["attachments"]),
                provenance=dict(content["provenance"]),
            )


@dataclass(frozen=True)
class PlannedPart:
    """Entry of one part of the plan, unfinished or sealed, to check its file before HDF5 opens it."""

    file: str
    """Name of the sealed file."""
    head_bytes: int
    crc_offset: int
    rows: int
    sha256: str
    """SHA-256 of the head without `crc32`."""

    def __post_init__(self) -> None:
        """Check the values."""
        _require_counts(self.file, rows=self.rows, head_bytes=self.head_bytes, crc_offset=self.crc_offset)
        _require_sha256(self.file, self.sha256)

    def check(self, path: Path) -> None:
        """Raise CacheError if the head is damaged."""
        try:
            check_regular_file(path)
            sound = head_sha256(path, self.head_bytes, self.crc_offset, self.rows) == self.sha256
        except OSError as error:
            raise read_error(path, error) from error
        if not sound:
            advice = "Delete the file and run `pipe precompute` again to redo its contents."
            raise DamagedFileError(path, f"its head of {self.head_bytes} bytes is damaged (SHA-256 mismatch)", advice)


@dataclass(frozen=True)
class Plan:
    """The parts that were created since the manifest was written."""

    parts: dict[str, PlannedPart]
    """By name of the sealed file."""

    def save(self, folder: Path) -> None:
        """Write or replace the plan atomically. Raises OSError."""
        _save_checksummed(folder / PLAN_NAME, {"parts": [asdict(part) for part in self.parts.values()]})

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Load the plan of `folder`, empty if there is none. Raises FileError."""
        path = folder / PLAN_NAME
        if not path.exists():
            return cls({})
        content = _load_checksummed(path)
        with _content_errors(path):
            return cls({part["file"]: PlannedPart(**part) for part in content["parts"]})


def is_cache_json(path: Path) -> bool:
    """Return whether a file named like a manifest or plan is one, since other programs use such names too."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == _FORMAT


def unlisted_parts(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files named like a part that neither the manifest nor the plan lists. Raises CacheError, OSError."""
    known = {part.file for part in manifest.parts} | Plan.load(folder).parts.keys()
    named = (path for path in folder.iterdir() if PART_NAME.fullmatch(path.name))
    return sorted(path for path in named if sealed_name(path) not in known)


def _save_checksummed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that ends with the SHA-256 of everything before it."""
    whole = {"format": _FORMAT, "format_version": FORMAT_VERSION, **content}
    body = json.dumps(whole, indent=2, ensure_ascii=False).removesuffix("\n}").encode("utf-8", "backslashreplace")
    write_atomically(path, body + f',\n  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode())


def _load_checksummed(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise read_error(path, error) from error
    with _content_errors(path):
        content: dict[str, Any] = json.loads(data)
        name, version = content["format"], content["format_version"]
        if (name, version) != (_FORMAT, FORMAT_VERSION):
            raise CacheError(f"it is {name} version {version}, only {_FORMAT} version {FORMAT_VERSION} is supported")
        found = _CHECKSUMMED.fullmatch(data)
        if not found or hashlib.sha256(found[1]).hexdigest() != found[2].decode():
            raise CacheError("the SHA-256 at its end does not match")
        return content


@contextmanager
def _content_errors(path: Path) -> Iterator[None]:
    """Convert errors in the content to a DamagedFileError."""
    try:
        yield
    except (CacheError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        advice = "Delete this one file and run `pipe precompute` again; the features are kept."
        raise DamagedFileError(path, f"cannot be used: {problem}", advice) from error
