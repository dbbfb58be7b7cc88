"""How far apart two programs may be that compute the same: every processor rounds, and sums, in its own way."""

import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor

FLOAT32 = 1e-4
"""Relative to the norm of what is compared, in float32.

Sums in another order make 3e-6 at most with the instructions of SSE2 to AVX2, losses and gradients included, and thirty
times that is left for other processors. A mask, a position or a label that is wrong changes more than a hundredth.
"""

LOGITS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Absolute, of logits up to 13, as the small checkpoint has them.

Computing in float16 moved them by 0.015 at most, in bfloat16 by 0.13, whichever instructions were used; these bounds
are some four to seven times that.
"""

DTYPE_OF_4_BIT_ANSWERS = torch.bfloat16 if has_avx512bf16() else torch.float32
"""Where a CPU has bfloat16 instructions, bitsandbytes answers with them, whatever the dtype that is asked for."""


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference to the norm of `b`."""
    difference = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-12)
    return float(difference)
