"""A language modelling loss of which only a part has logits at any time.

Logits of a large vocabulary are the peak of training: at 65,536 tokens a batch of 8,192 positions has 2 GiB of them in
float32, and cross entropy makes three copies. Here the head and the loss run on chunks of positions, and once more
in the backward pass, so that no chunk's logits outlive it.

Symbols: B rows, T positions, C channels, V vocabulary, n positions of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling_rwkv.packing import IGNORED

FEWEST_POSITIONS = 1024  # of a chunk: fewer keep neither a GPU nor two cores busy


def chunked_loss(
    loss_function: Callable[..., Tensor],
    head: nn.Module,
    x: Tensor,
    shift_labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """What ``loss_function`` gives for the logits ``head(x)``, computed where a label counts and nowhere else.

    A chunk has C positions, so that its logits are about as large as the matrix of the head, which must be in memory
    anyway, as must its gradient; but no fewer than ``FEWEST_POSITIONS``. Gradients of the head's weights are summed
    over chunks in the dtype of the weights, as gradient accumulation does over batches.

    Args:
        loss_function: as transformers' ``ForCausalLMLoss``; it must be a sum over positions once it is given
            ``num_items_in_batch``. It also gets ``kwargs``.
        x: (B, T, C), the input of ``head``.
        shift_labels: (B, T) int64, for every position the token that follows, or -100.
        num_items_in_batch: what the sum is divided by; by default the number of labels that count.

    Raises:
        ValueError: there is not one label for each position.
    """
    if shift_labels.shape != x.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(shift_labels.shape)} but logits were asked for at {tuple(x.shape[:2])}: "
            "give one label for each position, and no logits_to_keep"
        )
    x, labels = x.flatten(0, 1), shift_labels.flatten().to(x.device)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORED).sum()
    if not torch.compiler.is_compiling():  # how many count is data, of which a compiled graph's shapes cannot depend
        counts = (labels != IGNORED).nonzero()[:, 0]
        x, labels = x[counts], labels[counts]

    def part(x: Tensor, labels: Tensor) -> Tensor:
        with autocast_alone(x.device.type):
            logits = head(x)
        return loss_function(
            logits=logits, labels=None, shift_labels=labels, num_items_in_batch=num_items_in_batch, **kwargs
        )

    n = max(FEWEST_POSITIONS, x.shape[-1])
    parts = [checkpoint(part, *chunk, use_reentrant=False) for chunk in zip(x.split(n), labels.split(n), strict=True)]
    return torch.stack(parts).sum()


def autocast_alone(device: str) -> torch.autocast:
    """Autocast as it is, but every use of a weight with a cast of its own: gradients meet after it, in float32."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)
