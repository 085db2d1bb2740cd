"""The environment of every test, set before torch, transformers or rwkv can be imported."""

import os
from pathlib import Path

# Kernels are compiled once for all tests, and not into the user's own cache.
os.environ["RWKV_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "kernels")

# No test may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# The official `rwkv` package, a peer in the tests, reads these when it is imported.
os.environ["RWKV_JIT_ON"] = "0"
os.environ["RWKV_CUDA_ON"] = "0"
os.environ["RWKV_V7_ON"] = "0"

# Parallel workers with a pool of threads each would only fight over the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
