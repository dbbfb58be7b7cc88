"""Simulation of a kill at any system call that changes the disk, in one process."""

import os

import pytest

CHANGES = ("pwrite", "replace", "unlink", "mkdir", "fsync", "fdatasync")


class Killed(BaseException):
    pass


class Kill:
    """Count system calls that change the disk and raise at the n-th, in the middle of a long write.

    All later calls raise too, since a killed process cleans up nothing. Flushes are skipped, and rows are committed
    after every few bytes so that there are more steps.
    """

    def __init__(self, monkeypatch, at=None):
        self.at, self.calls = at, 0
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._guarded(name, getattr(os, name)))
        monkeypatch.setattr("cache.part.COMMIT_BYTES", 50)

    def _guarded(self, name, call):
        def guarded(*args, **options):
            self.calls += 1
            if self.at is not None and self.calls >= self.at:
                if name == "pwrite" and self.calls == self.at and len(args[1]) > 8:
                    call(args[0], args[1][: len(args[1]) // 2], args[2])
                raise Killed
            return None if "sync" in name else call(*args, **options)

        return guarded


def undisturbed(run):
    """Run to the end; return the number of such calls."""
    with pytest.MonkeyPatch.context() as patch:
        kill = Kill(patch)
        run()
    return kill.calls


def killed(step, run):
    """Run up to the `step`-th such call."""
    with pytest.MonkeyPatch.context() as patch:
        Kill(patch, at=step)
        with pytest.raises(Killed):
            run()
