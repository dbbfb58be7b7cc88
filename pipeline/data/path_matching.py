"""Image files whose names are spelled another way than in the annotations."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from unicodedata import normalize

_Key = Callable[[str], str]
_same: _Key = partial(normalize, "NFC")


def _near(name: str) -> str:
    return _same(name).casefold()


def match_paths(missing: Iterable[Path]) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Of files that are not there, those that are under a name that means the same, and those under a near one.

    The same are names that differ in their Unicode form (a Mac writes é as two characters) or in the kind of slash;
    near are those that differ in case, too. A name that fits several files is neither. Each folder is listed once.
    """
    folders = _Folders()
    same: dict[Path, Path] = {}
    near: dict[Path, Path] = {}
    for path in missing:
        if found := folders.find(path, _same):
            same[path] = found
        elif found := folders.find(path, _near):
            near[path] = found
    return same, near


class _Folders:
    """What lies in folders, remembered."""

    def __init__(self) -> None:
        self._is_folder: dict[Path, bool] = {}
        self._names: dict[tuple[Path, _Key], dict[str, list[str]]] = {}

    def find(self, path: Path, key: _Key) -> Path | None:
        """The one file whose name has the same key, part by part."""
        folder = next(filter(self._is_there, path.parents), None)
        if folder is None:
            return None
        parts = str(path.relative_to(folder)).replace("\\", "/").split("/")
        for part in parts:
            if part in ("", "."):
                continue
            fitting = self._in(folder, key).get(key(part), [])
            if part == ".." or len(fitting) != 1:
                return None
            folder = folder / fitting[0]
        return folder if folder.is_file() else None

    def _is_there(self, folder: Path) -> bool:
        if folder not in self._is_folder:
            self._is_folder[folder] = folder.is_dir()
        return self._is_folder[folder]

    def _in(self, folder: Path, key: _Key) -> dict[str, list[str]]:
        """The names in a folder, by their key."""
        if (folder, key) not in self._names:
            found: dict[str, list[str]] = {}
            with suppress(OSError):
                for path in folder.iterdir():
                    found.setdefault(key(path.name), []).append(path.name)
            self._names[folder, key] = found
        return self._names[folder, key]
