"""Ranks of one training, as torchrun starts them."""

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from processes import Ended, Running, started

FREED = "the process group is freed"


@contextmanager
def team(logs: Path, size: int, *words: object, prepare: Callable[[], object] | None = None) -> Iterator[list[Running]]:
    """`pipe WORDS` in processes that belong together."""
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


def together(logs: Path, size: int, *words: object, prepare: Callable[[], object] | None = None) -> list[Ended]:
    with team(logs, size, *words, prepare=prepare) as processes:
        return [process.ended() for process in processes]


def forbid_freeing_the_group() -> None:
    """It may wait for ever for the group's threads, which may wait for the interpreter's lock."""

    def free(*_: object) -> None:
        print(FREED, file=sys.stderr, flush=True)

    torch.distributed.destroy_process_group = free
