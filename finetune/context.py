"""What a longer context is worth: the loss by position, and by how much text is read at a time.

A figure like the paper's on context length (Peng et al. 2023, arXiv:2305.13048, section 5): a model that uses its
context predicts later tokens better, and text in longer pieces better.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from rwkv_eval.losses import CHUNK, PositionLosses, token_losses
from rwkv_finetune.packing import IGNORED, PackedRows, TokenStream
from rwkv_finetune.run_folder import unfinished


@dataclass(frozen=True)
class ContextLoss:
    """Losses of one model on one text, in nats per token.

    by_length: from the tokens that are read at a time to the loss over all of them.
    by_position: from an end to the loss of the tokens from the last end (or 1) up to it, read as far as is possible.
    """

    by_length: dict[int, float]
    by_position: dict[int, float]


@torch.inference_mode()
def measure(
    model: PreTrainedModel, stream: TokenStream, lengths: Sequence[int], pad_token_id: int, name: str
) -> ContextLoss:
    """The losses of `model` on `stream` read in pieces of each of `lengths`; `name` is for the progress bar."""
    was_training = model.training
    model.eval()
    by_length, losses = {}, PositionLosses()
    sets = [PackedRows(stream, length, pad_token_id) for length in sorted(lengths)]
    with tqdm(total=len(sets) * len(stream.tokens), desc=f"measuring {name}", unit="token", unit_scale=True) as bar:
        for rows in sets:
            losses = PositionLosses()
            for batch in DataLoader(rows, batch_size=max(1, CHUNK // rows.block_size)):
                scored = batch["labels"] != IGNORED
                losses.add(batch["position_ids"][scored], _nats(model, batch)[scored])
                bar.update(scored.numel())
            by_length[rows.block_size] = losses.mean
    model.train(was_training)
    return ContextLoss(by_length, losses.means())


def _nats(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T) float32 on the CPU: of each token given those before it in its piece."""
    begins = (batch["position_ids"].flatten() == 0).nonzero()[:, 0]
    bounds = F.pad(begins, (0, 1), value=batch["input_ids"].numel())
    return token_losses(model, batch["input_ids"].flatten(), bounds, CHUNK).cpu().view(batch["input_ids"].shape)


def save_losses(losses: Mapping[str, ContextLoss], folder: Path) -> None:
    """Write `context.json` and `context.png`, whole or not at all; `losses` by the name of a model."""
    path = folder / "context.json"
    text = json.dumps({name: asdict(loss) for name, loss in losses.items()}, indent=2)
    unfinished(path).write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished(path), path)
    _plot(losses, folder / "context.png")


def load_losses(folder: Path) -> dict[str, ContextLoss]:
    """What `save_losses` wrote; nothing if it did not."""
    path = folder / "context.json"
    if not path.exists():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    numbers = {
        name: {key: {int(k): v for k, v in x.items()} for key, x in loss.items()} for name, loss in saved.items()
    }
    return {name: ContextLoss(**loss) for name, loss in numbers.items()}


def _plot(losses: Mapping[str, ContextLoss], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, loss in losses.items():
        left.plot(list(loss.by_length), list(loss.by_length.values()), marker="o", label=name)
        right.plot(list(loss.by_position), list(loss.by_position.values()), marker=".", label=name)
    left.set(xlabel="tokens read at a time", ylabel="test loss (nats per token)", xscale="log")
    right.set(xlabel="position of the token", xscale="log")
    left.set_xscale("log", base=2)
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(title="trained with")
    figure.savefig(unfinished(path), dpi=120, format="png")
    os.replace(unfinished(path), path)
