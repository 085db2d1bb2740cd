"""The environment of every test, set before torch, transformers or rwkv can be imported."""

import os
from pathlib import Path

import pytest

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


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws by torch does not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def steps(monkeypatch):
    """The rows of every token that a kernel computed at once on a CPU."""
    from rwkv_kernels import decode_cpu

    rows: list[int] = []
    step = decode_cpu.Decoder.step

    def counted(self, ids, *others):
        result = step(self, ids, *others)
        if result is not None:
            rows.append(len(ids))
        return result

    monkeypatch.setattr(decode_cpu.Decoder, "step", counted)
    return rows
