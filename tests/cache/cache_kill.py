"""A process killed at any system call that changes the disk, played in one process."""

import os

import pytest

CHANGES = ("pwrite", "replace", "unlink", "mkdir", "fsync", "fdatasync")


class Killed(BaseException):
    pass


class Kill:
    """Counts system calls that change the disk and kills at the n-th; of a long write, half is done by then.

    From then on none goes through: what a failing process would clean up, a killed one does not. Nothing waits for
    the disk, and commits come after every few bytes instead of after seconds, so that there is more to be killed in.
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
    """Runs to the end; -> how many such calls that took."""
    with pytest.MonkeyPatch.context() as patch:
        kill = Kill(patch)
        run()
    return kill.calls


def killed(step, run):
    """Runs up to the `step`-th such call."""
    with pytest.MonkeyPatch.context() as patch:
        Kill(patch, at=step)
        with pytest.raises(Killed):
            run()
