"""Find image files whose names differ from the annotations in Unicode form, slashes or case."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from unicodedata import normalize

_Key = Callable[[str], str]
_equivalent: _Key = partial(normalize, "NFC")


def _similar(name: str) -> str:
    return _equivalent(name).casefold()


def match_paths(missing: Iterable[Path]) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Find missing files under equivalent and under similar names.

    Equivalent names differ in Unicode form (macOS stores é as two characters) or in the kind of slash; similar ones
    also in case. Names that match several files are not used. Each folder is listed once.

    Returns:
        Missing path -> file with an equivalent name, and missing path -> file with a similar name.
    """
    folders = _Folders()
    equivalent: dict[Path, Path] = {}
    similar: dict[Path, Path] = {}
    for path in missing:
        if found := folders.find(path, _equivalent):
            equivalent[path] = found
        elif found := folders.find(path, _similar):
            similar[path] = found
    return equivalent, similar


class _Folders:
    """Cached listings of folders."""

    def __init__(self) -> None:
        self._is_folder: dict[Path, bool] = {}
        self._names: dict[tuple[Path, _Key], dict[str, list[str]]] = {}

    def find(self, path: Path, key: _Key) -> Path | None:
        """Return the only file whose path has the same key, component by component."""
        folder = next(filter(self._exists, path.parents), None)
        if folder is None:
            return None
        parts = str(path.relative_to(folder)).replace("\\", "/").split("/")
        for part in parts:
            if part in ("", "."):
                continue
            matches = self._listing(folder, key).get(key(part), [])
            if part == ".." or len(matches) != 1:
                return None
            folder = folder / matches[0]
        return folder if folder.is_file() else None

    def _exists(self, folder: Path) -> bool:
        if folder not in self._is_folder:
            self._is_folder[folder] = folder.is_dir()
        return self._is_folder[folder]

    def _listing(self, folder: Path, key: _Key) -> dict[str, list[str]]:
        """Return the names in a folder by key."""
        if (folder, key) not in self._names:
            found: dict[str, list[str]] = {}
            with suppress(OSError):
                for path in folder.iterdir():
                    found.setdefault(key(path.name), []).append(path.name)
            self._names[folder, key] = found
        return self._names[folder, key]
