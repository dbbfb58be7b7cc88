"""The command in processes of its own, to be killed, starved or started together.

They are forked from one that has the libraries loaded, because to load them takes seconds.
"""

import multiprocessing
import os
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

HUNG = 120  # seconds: far longer than anything here takes

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "pipeline.cli", "pipeline.commands.precompute"])
_numbers = count()


@dataclass(frozen=True)
class Ended:
    """What is left of a process: below 0, `status` is the signal that killed it."""

    status: int
    out: str
    err: str

    def told(self) -> list[str]:
        """What stderr says, without progress bars."""
        lines = [line.strip() for line in self.err.replace("\r", "\n").splitlines()]
        return [line for line in lines if line and "%|" not in line]

    def error(self) -> str:
        """Why it failed: one line, and no traceback. A line more is a leftover of a progress bar."""
        assert self.status in (1, 2), self.err
        assert "Traceback" not in self.err, self.err
        told = [line for line in self.told() if line.startswith("pipe: ")]
        assert len(told) == 1, self.err
        assert self.told()[-1] == told[0], self.err
        assert self.out == ""
        return told[0]


@dataclass(frozen=True)
class Running:
    process: BaseProcess
    log: Path

    @property
    def err(self) -> str:
        return self.log.with_suffix(".err").read_text() if self.log.with_suffix(".err").exists() else ""

    def ended(self) -> Ended:
        """Waits for its end."""
        self.process.join(HUNG)
        assert self.process.exitcode is not None, f"hangs: {self.err}"
        return Ended(self.process.exitcode, self.log.with_suffix(".out").read_text(), self.err)


@contextmanager
def started(
    logs: Path,
    *words: object,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Running]:
    """`pipe WORDS`, its output in `logs`; `prepare` is called in it first. What still runs at the end is killed."""
    log = logs / f"run-{next(_numbers)}"
    process = _SERVER.Process(target=_run, args=([str(word) for word in words], log, dict(environment or {}), prepare))
    process.start()
    try:
        yield Running(process, log)
    finally:
        process.kill()
        process.join()


def wait_for(there: Callable[[], object], running: Running) -> None:
    """Until something is there, while the process runs."""
    began = time.monotonic()
    while not there():
        assert running.process.is_alive(), running.err
        assert time.monotonic() - began < HUNG, f"hangs: {running.err}"
        time.sleep(0.01)


def pipe(logs: Path, *words: object, prepare: Callable[[], object] | None = None) -> Ended:
    """`pipe WORDS` to its end."""
    with started(logs, *words, prepare=prepare) as running:
        return running.ended()


def _run(words: list[str], log: Path, environment: dict[str, str], prepare: Callable[[], object] | None) -> None:
    for suffix, descriptor in ((".out", 1), (".err", 2)):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    os.environ.update(environment)
    from tqdm import tqdm

    from pipeline.cli import main

    tqdm.set_lock(threading.RLock())  # its own is for processes too, and who is killed leaves it behind
    try:
        if prepare:
            prepare()
        main(words, prog_name="pipe")
    except Exception:  # as Python does at the end of the real command
        traceback.print_exc()
        os._exit(1)


class Mounts:
    """File systems that nobody else sees, in a mount namespace that a shell keeps.

    What it mounts at `place`, all see at `folder`. Raises OSError if that is not permitted.
    """

    def __init__(self, folder: Path) -> None:
        for user in (["--user", "--map-root-user"], []):
            self._shell = subprocess.Popen(
                ["unshare", *user, "--mount", "sh"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            self.place, self.folder = folder, Path(f"/proc/{self._shell.pid}/root{folder}")
            try:
                self.do(f"mount -t tmpfs -o size=1m tmpfs {folder}; umount {folder}")
                return
            except OSError as error:
                reason = error
                self.close()
        raise reason

    def do(self, commands: str) -> None:
        """Has the shell do something, as the root of its namespace."""
        assert self._shell.stdin
        assert self._shell.stdout
        try:
            self._shell.stdin.write(f"( set -e; {commands} ) 2>&1; echo ended $?\n")
            self._shell.stdin.flush()
        except BrokenPipeError:
            pass
        told = ""
        for line in self._shell.stdout:
            if line.startswith("ended"):
                if line.split() != ["ended", "0"]:
                    raise OSError(f"{commands}: {told}")
                return
            told += line
        raise OSError(told or "no shell in a mount namespace")

    def close(self) -> None:
        self._shell.kill()
        self._shell.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
