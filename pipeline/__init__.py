"""Two stages: encode the pictures once, train from the cache again and again."""

import os

# OpenMP's idle threads spin by default, for milliseconds. Beside the threads that decode pictures, or on a machine that
# others use too, that takes the processor from those who could work. Read when torch is loaded, hence here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
