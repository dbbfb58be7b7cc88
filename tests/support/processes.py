"""Run the command in separate processes, which tests can kill or start together.

They are forked from a server process that has imported the libraries, as the imports take seconds.
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

TIMEOUT = 120  # seconds, far longer than any command in the tests takes

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "pipeline.cli", "pipeline.commands.precompute"])
_numbers = count()


@dataclass(frozen=True)
class Finished:
    """A finished process; a negative `status` is the number of the signal that killed it."""

    status: int
    out: str
    err: str

    def log_lines(self) -> list[str]:
        """Return the lines of stderr without progress bars."""
        lines = [line.strip() for line in self.err.replace("\r", "\n").splitlines()]
        return [line for line in lines if line and "%|" not in line]

    def error(self) -> str:
        """Return the error message, after a check that it is one line, the last, and no traceback."""
        assert self.status in (1, 2), self.err
        assert "Traceback" not in self.err, self.err
        errors = [line for line in self.log_lines() if line.startswith("pipe: ")]
        assert len(errors) == 1, self.err
        assert self.log_lines()[-1] == errors[0], self.err
        assert self.out == ""
        return errors[0]


@dataclass(frozen=True)
class Running:
    """A running process, whose output goes to the files `log`.out and `log`.err."""

    process: BaseProcess
    log: Path

    @property
    def err(self) -> str:
        """Stderr so far."""
        return self.log.with_suffix(".err").read_text() if self.log.with_suffix(".err").exists() else ""

    def wait(self) -> Finished:
        """Wait until the process has finished."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, f"hangs: {self.err}"
        return Finished(self.process.exitcode, self.log.with_suffix(".out").read_text(), self.err)


@contextmanager
def started(
    logs: Path,
    *words: object,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Running]:
    """Start `pipe WORDS` with its output in `logs`; call `prepare` in it first. Kill it at the end of the block."""
    log = logs / f"run-{next(_numbers)}"
    process = _SERVER.Process(target=_run, args=([str(word) for word in words], log, dict(environment or {}), prepare))
    process.start()
    try:
        yield Running(process, log)
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], object], running: Running) -> None:
    """Wait until `condition` is true; fail if the process ends before."""
    began = time.monotonic()
    while not condition():
        assert running.process.is_alive(), running.err
        assert time.monotonic() - began < TIMEOUT, f"hangs: {running.err}"
        time.sleep(0.01)


def pipe(logs: Path, *words: object, prepare: Callable[[], object] | None = None) -> Finished:
    """Run `pipe WORDS` to the end."""
    with started(logs, *words, prepare=prepare) as running:
        return running.wait()


def _run(words: list[str], log: Path, environment: dict[str, str], prepare: Callable[[], object] | None) -> None:
    for suffix, descriptor in ((".out", 1), (".err", 2)):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), descriptor)
    os.environ.update(environment)
    from tqdm import tqdm

    from pipeline.cli import main

    tqdm.set_lock(
        threading.RLock()
    )  # the default lock is shared between processes, and a killed process does not release it
    try:
        if prepare:
            prepare()
        main(words, prog_name="pipe")
    except Exception:  # as Python does for the real command
        traceback.print_exc()
        os._exit(1)


class Mounts:
    """A mount namespace kept by a shell, in which tests can mount file systems without affecting others.

    What is mounted at `place` in the namespace is visible outside at `folder`. Raises OSError if that is not permitted.
    """

    def __init__(self, folder: Path) -> None:
        for user in (["--user", "--map-root-user"], []):
            self._shell = subprocess.Popen(
                ["unshare", *user, "--mount", "sh"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            self.place, self.folder = folder, Path(f"/proc/{self._shell.pid}/root{folder}")
            try:
                self.run(f"mount -t tmpfs -o size=1m tmpfs {folder}; umount {folder}")
                return
            except OSError as error:
                reason = error
                self.close()
        raise reason

    def run(self, commands: str) -> None:
        """Run shell commands as root of the namespace. Raises OSError with their output if they fail."""
        assert self._shell.stdin
        assert self._shell.stdout
        try:
            self._shell.stdin.write(f"( set -e; {commands} ) 2>&1; echo ended $?\n")
            self._shell.stdin.flush()
        except BrokenPipeError:
            pass
        output = ""
        for line in self._shell.stdout:
            if line.startswith("ended"):
                if line.split() != ["ended", "0"]:
                    raise OSError(f"{commands}: {output}")
                return
            output += line
        raise OSError(output or "no shell in a mount namespace")

    def close(self) -> None:
        """End the shell, and with it the namespace."""
        self._shell.kill()
        self._shell.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in `folder` by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
