"""How fast a training run is, how much of its device that uses, and how much memory it took.

The operations of a token: 2 for each weight of a matrix forwards, 2 backwards through it, 2 more for its gradient if
it is trained. Embeddings are looked up and cost none. Model FLOPs utilisation (MFU) is these, a second, over the
device's peak in dense bfloat16, whatever the precision of the run.
"""

import resource
import sys
import time

import torch
from torch import nn

# bfloat16 without sparsity, FLOP/s, from the makers' data sheets; the first name that is part of the device's counts.
PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def operations_per_token(model: nn.Module) -> int:
    """Of a training step without recomputation, in FLOP."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {id(x): x for x in model.parameters() if id(x) not in looked_up}.values()
    return sum(_size(x) * (6 if x.requires_grad else 4) for x in weights)


def _size(x: nn.Parameter) -> int:
    """Weights in a tensor; the two of a byte, where they are quantised to 4 bits."""
    quantised = getattr(x, "quant_state", None)
    return quantised.shape.numel() if quantised is not None else x.numel()


def peak_flops(device: torch.device) -> float | None:
    """Of the device in bfloat16; None where the table does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


class Speedometer:
    """Tokens a second between two readings, less the time when it was stopped."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Also if it runs already."""
        self._since = self._since or time.monotonic()

    def stop(self) -> None:
        """Also if it stands already."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def read(self, tokens: int) -> float | None:
        """Tokens a second since the last reading, given all tokens so far; None if no time passed."""
        running = self._since is not None
        self.stop()
        speed = (tokens - self.tokens) / self.seconds if self.seconds else None
        self.tokens, self.seconds = tokens, 0.0
        if running:
            self.start()
        return speed
