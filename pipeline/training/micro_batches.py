"""Split an optimizer step into micro-batches that fit into memory."""

import torch

from pipeline.batches.sequences import ImageSequence, micro_batches
from pipeline.blip2.memory import free_memory_bytes
from pipeline.common.distributed import local_world_size

MAX_MEMORY_FRACTION = 0.6
"""Activations may take this fraction of the memory that is free when training starts."""
MAX_ACTIVATION_BYTES = {"cpu": 2 << 30, "cuda": 64 << 30}
"""Per device type. Larger micro-batches hardly increase throughput."""


def max_tokens_that_fit(bytes_per_token: float, device: torch.device) -> int:
    """Return the number of tokens in a micro-batch whose activations fit into memory.

    The result is rounded down to three significant bits, so that a small difference in free memory does not change the
    order in which losses are summed. Ranks on one machine divide the free memory of its CPU.

    Args:
        bytes_per_token: memory that a token's activations keep for the backward pass.
        device: the device that computes.
    """
    free = free_memory_bytes(device) / (local_world_size() if device.type == "cpu" else 1)
    available = min(MAX_MEMORY_FRACTION * free, MAX_ACTIVATION_BYTES[device.type])
    max_tokens = int(available / bytes_per_token)
    low_bits = max(max_tokens.bit_length() - 3, 0)
    return max(max_tokens >> low_bits << low_bits, 1)


class MicroBatcher:
    """Splits the sequences of an optimizer step into micro-batches of at most `max_size` questions or tokens."""

    def __init__(self, max_questions: int | None) -> None:
        """Create a splitter by questions or by tokens.

        Args:
            max_questions: questions in a micro-batch; None to count tokens, whose `max_size` must be set before use.
        """
        self.unit = "tokens" if max_questions is None else "questions"
        self.max_size = max_questions

    def split(self, sequences: list[ImageSequence]) -> list[list[ImageSequence]]:
        """Return the micro-batches; a sequence larger than `max_size` is one of its own."""
        assert self.max_size is not None
        return micro_batches(sequences, self._size, self.max_size)

    def largest(self, groups: list[list[ImageSequence]]) -> int:
        """Return the size of the largest micro-batch."""
        return max(sum(map(self._size, group)) for group in groups)

    def _size(self, sequence: ImageSequence) -> int:
        return sequence.num_questions if self.unit == "questions" else sequence.num_tokens
