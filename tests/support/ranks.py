"""Start the ranks of one command, as torchrun does."""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from processes import Finished, Running, started

FREED = "the process group is freed"


@contextmanager
def running_ranks(
    logs: Path, size: int, *words: object, prepare: Callable[[], object] | None = None
) -> Iterator[list[Running]]:
    """Run `pipe WORDS` on `size` ranks; yield the running processes."""
    with socket.socket() as free, ExitStack() as processes:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
        free.close()
        yield [
            processes.enter_context(
                started(
                    logs, *words, prepare=prepare,
                    environment={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
            for rank in range(size)
        ]  # fmt: skip


def run_ranks(logs: Path, size: int, *words: object, prepare: Callable[[], object] | None = None) -> list[Finished]:
    """Run `pipe WORDS` on `size` ranks to the end."""
    with running_ranks(logs, size, *words, prepare=prepare) as processes:
        return [process.wait() for process in processes]


def report_group_destruction() -> None:
    """Print `FREED` if the process group is destroyed, which can deadlock: see `exit_without_group_teardown`."""

    def free(*_: object) -> None:
        print(FREED, file=sys.stderr, flush=True)

    torch.distributed.destroy_process_group = free
