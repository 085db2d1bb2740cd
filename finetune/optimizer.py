"""The optimizer groups of the RWKV paper, and its penalty on large logits.

    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3), betas=(0.9, 0.99), eps=1e-8)

Matrices and `time_mix_*` learn at the base rate, `time_decay` at twice and `time_first` at three
times that rate. Weight decay, if any, is for matrices only. (RWKV-LM, v4neo.)
"""

from typing import Any

import torch
from torch import nn

LEARNING_RATE_MULTIPLIERS = {"time_decay": 2.0, "time_first": 3.0}  # every other parameter: 1


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Every trainable parameter of `model` in exactly one group, largest group first.

    Returns:
        Groups for any torch optimizer, with a `name` each. Groups without parameters are left
        out. Schedulers scale each group's own rate, so the ratios hold all along.
    """
    groups = {
        "matrices": {"lr": learning_rate, "weight_decay": weight_decay},
        "vectors": {"lr": learning_rate, "weight_decay": 0.0},
    }
    for name, multiplier in LEARNING_RATE_MULTIPLIERS.items():
        groups[name] = {"lr": learning_rate * multiplier, "weight_decay": 0.0}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter)].append(parameter)
    return [{"name": name, "params": members[name], **settings} for name, settings in groups.items() if members[name]]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in LEARNING_RATE_MULTIPLIERS:
        return leaf
    is_vector = sum(size > 1 for size in parameter.shape) <= 1  # time_mix_* are (1, 1, C)
    return "vectors" if is_vector else "matrices"


def largest_logit_penalty(logits: torch.Tensor, weight: float = 1e-4) -> torch.Tensor:
    """Half of `weight` times the mean square of each position's largest logit ("L2Wrap").

    Its gradient is `weight / (B * T) * max` at each position's largest logit and zero elsewhere:
    it keeps logits near zero, where low precision is most exact.

    Args:
        logits: (B, T, V) any float.

    Returns:
        () fp32, or fp64 for fp64 logits.
    """
    largest = logits.max(dim=-1).values
    largest = largest.to(torch.promote_types(largest.dtype, torch.float32))
    return 0.5 * weight * largest.square().mean()
