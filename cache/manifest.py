"""The manifest: written last, it makes a folder of parts a finished cache and says what belongs to it."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cache.files import write_atomically
from cache.format import PART_NAME, check_head, check_regular_file, head_sha256, read_error
from cache.spec import FORMAT_VERSION, CacheError, CacheSpec, DamagedFileError

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
TEXT_NAME = re.compile(r"text-([A-Za-z0-9][A-Za-z0-9_-]*)-[0-9a-f]{12}\.h5")
ATTACHMENT_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)\.(jsonl|h5)")
ATTACHMENT_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*-[0-9a-f]{12}\.(jsonl|h5)")
ATTACHMENT_TEMPORARY = "attachment.tmp"
"""What an attachment is called while it is written."""
_FORMAT = "blip2-query-features"
_SIGNED = re.compile(rb'(\{.*),\n  "sha256": "([0-9a-f]{64})"\n\}\n', re.DOTALL)


@dataclass(frozen=True)
class PartEntry:
    """One sealed part: what must be true of its file before HDF5 opens it."""

    file: str
    rows: int
    head_bytes: int
    """All of the file but its features."""
    head_sha256: str

    def __post_init__(self) -> None:
        _require_counts(self.file, rows=self.rows, head_bytes=self.head_bytes)
        _require_sha256(self.file, self.head_sha256)

    def size(self, row_bytes: int) -> int:
        """Bytes of the file."""
        return self.head_bytes + self.rows * row_bytes

    def check(self, folder: Path, row_bytes: int) -> None:
        """Raises CacheError if the file is missing, cut, or its head is not what was written."""
        check_head(folder / self.file, self.head_bytes, self.head_sha256, self.size(row_bytes))


@dataclass(frozen=True)
class TextEntry:
    """The text of one split; the file's name holds the first digits of its digest."""

    file: str
    questions: int
    sha256: str

    def __post_init__(self) -> None:
        _require_sha256(self.file, self.sha256)


def _require_counts(file: str, **values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CacheError(f"{file}: {name} is {value!r}, must be a whole number from 1 to {(1 << 31) - 1}")


def _require_sha256(file: str, value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise CacheError(f"{file}: {value!r} is no SHA-256, 64 hex digits")


def attachment_file(name: str, sha256: str) -> str:
    """The file name of an attachment: it holds the first digits of its digest, so that no file is ever replaced.

    Raises CacheError if the name is not one that an attachment may have.
    """
    found = ATTACHMENT_NAME.fullmatch(name)
    if not found:
        raise CacheError(f"{name!r} is not a name that an attachment may have: letters, digits, _ and -, .jsonl or .h5")
    _require_sha256(name, sha256)
    return f"{found[1]}-{sha256[:12]}.{found[2]}"


@dataclass(frozen=True)
class Manifest:
    """What a finished cache consists of. Raises CacheError on construction for a file name that is not a cache's."""

    spec: CacheSpec
    part_rows: int
    """Rows of a full part, as the last writer was told."""
    parts: list[PartEntry]
    """In the order that numbers the rows of the cache."""
    rows: int
    """Rows that hold features; parts may have more."""
    splits: dict[str, TextEntry]
    attachments: dict[str, str] = field(default_factory=dict)
    """Name -> SHA-256, of what else lies in the cache, each in its `attachment_file`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where all this comes from, as JSON; the cache itself checks nothing against it."""

    def __post_init__(self) -> None:
        for part in self.parts:
            found = PART_NAME.fullmatch(part.file)
            if not found or found[2]:
                raise CacheError(f"{part.file!r} is not the name of a sealed part inside the cache's folder")
        for split, text in self.splits.items():
            named = TEXT_NAME.fullmatch(text.file)
            if not named or named[1] != split:
                raise CacheError(f"{text.file!r}, text of split {split!r}, is not a file name that a cache may have")
        for name, sha256 in self.attachments.items():
            attachment_file(name, sha256)

    @property
    def part_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size(self.spec.row_bytes) for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the cache holds, wherever it lies.

        Over the spec, the heads of the parts, in which the digests of the pictures and the checksums of their features
        stand, and the text.
        """
        held = {
            "spec": self.spec.to_attributes(),
            "parts": [part.head_sha256 for part in self.parts],
            "splits": {split: text.sha256 for split, text in sorted(self.splits.items())},
        }
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes or replaces the manifest in one step. Raises OSError."""
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
        """The inverse of `save`. Raises CacheError if it cannot be read, is changed or of another version."""
        path = folder / MANIFEST_NAME
        content = _load_checksummed(path)
        with _explained(path):
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
    """One part begun: what must be true of its file, in work or sealed, before HDF5 opens it."""

    file: str
    """Its name when it is sealed."""
    head_bytes: int
    crc_offset: int
    rows: int
    sha256: str
    """Of the head without `crc32`."""

    def __post_init__(self) -> None:
        _require_counts(self.file, rows=self.rows, head_bytes=self.head_bytes, crc_offset=self.crc_offset)
        _require_sha256(self.file, self.sha256)

    def check(self, path: Path) -> None:
        """Raises CacheError if the head is not what was written."""
        try:
            check_regular_file(path)
            sound = head_sha256(path, self.head_bytes, self.crc_offset, self.rows) == self.sha256
        except OSError as error:
            raise read_error(path, error) from error
        if not sound:
            advice = "Delete it and run `pipe precompute` again: only what was in it is made anew."
            raise DamagedFileError(path, f"its head of {self.head_bytes} bytes is not what was written", advice)


@dataclass(frozen=True)
class Plan:
    """The parts that were begun since the manifest was written."""

    parts: dict[str, PlannedPart]
    """By file name."""

    def save(self, folder: Path) -> None:
        """Raises OSError."""
        _save_checksummed(folder / PLAN_NAME, {"parts": [asdict(part) for part in self.parts.values()]})

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Empty if there is none. Raises CacheError."""
        path = folder / PLAN_NAME
        if not path.exists():
            return cls({})
        content = _load_checksummed(path)
        with _explained(path):
            return cls({part["file"]: PlannedPart(**part) for part in content["parts"]})


def is_cache_json(path: Path) -> bool:
    """Whether a file that has a manifest's or a plan's name is one: other programs have such names too."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == _FORMAT


def unlisted_parts(folder: Path, manifest: Manifest) -> list[Path]:
    """Files with a part's name that neither the manifest nor the plan names. Raises CacheError, OSError."""
    known = {part.file for part in manifest.parts} | Plan.load(folder).parts.keys()
    named = (path for path in folder.iterdir() if PART_NAME.fullmatch(path.name))
    return sorted(path for path in named if path.name.removesuffix(".partial") not in known)


def _save_checksummed(path: Path, content: Mapping[str, Any]) -> None:
    """JSON that ends in the SHA-256 of all that stands before it, so that a changed bit is noticed."""
    whole = {"format": _FORMAT, "format_version": FORMAT_VERSION, **content}
    body = json.dumps(whole, indent=2, ensure_ascii=False).removesuffix("\n}").encode("utf-8", "backslashreplace")
    write_atomically(path, body + f',\n  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode())


def _load_checksummed(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise read_error(path, error) from error
    with _explained(path):
        content: dict[str, Any] = json.loads(data)
        name, version = content["format"], content["format_version"]
        if (name, version) != (_FORMAT, FORMAT_VERSION):
            raise CacheError(f"it is of {name} version {version}, this program knows {_FORMAT} {FORMAT_VERSION}")
        signed = _SIGNED.fullmatch(data)
        if not signed or hashlib.sha256(signed[1]).hexdigest() != signed[2].decode():
            raise CacheError("it is not what was written: the SHA-256 at its end does not fit")
        return content


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever is wrong with the content comes out as a DamagedFileError."""
    try:
        yield
    except (CacheError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        advice = "If it is damaged, delete this one file and run `pipe precompute` again: the features are kept."
        raise DamagedFileError(path, f"cannot be used: {problem}", advice) from error
