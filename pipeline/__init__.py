"""Two stages: encode the pictures once, train from the cache again and again."""

import os

# Read when torch is loaded, hence here; what the user has set stays.
#
# OpenMP's idle threads spin by default, for milliseconds. Beside the threads that decode pictures, or on a machine that
# others use too, that takes the processor from those who could work.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# On a CPU, oneDNN and torch each keep 1,024 prepared matrix products, one for every shape that came by. Micro-batches
# differ in length: they would take 0.9 GB more, and are not faster for it.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
