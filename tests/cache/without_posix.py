"""Removal of what only POSIX systems have, to run the fallbacks; call it before this project is imported."""

import importlib
import os
import sys

MODULES = ("fcntl", "resource")
OS_NAMES = (
    "pwrite", "pwritev", "pread", "preadv", "posix_fadvise", "fdatasync", "major", "minor", "O_NONBLOCK", "O_NOCTTY",
    "O_DIRECTORY", "O_CLOEXEC",
)  # fmt: skip


def take_away_posix(*libraries):
    """Make the modules impossible to import and delete the names of `os`; what is absent anyway is skipped.

    `libraries` are imported first: those that on Linux cannot be imported without the modules.
    """
    for library in libraries:
        importlib.import_module(library)
    for module in MODULES:
        sys.modules[module] = None
    for name in OS_NAMES:
        if hasattr(os, name):
            delattr(os, name)
