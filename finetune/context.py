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

from modeling_rwkv.chunks import chunks
from rwkv_finetune.packing import IGNORED, PackedRows, TokenStream
from rwkv_finetune.run_folder import unfinished

POSITIONS = 2048  # that are read together, and whose logits are in memory at a time


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
    by_length, nats, counts = {}, torch.zeros(1), torch.zeros(1)
    sets = [PackedRows(stream, length, pad_token_id) for length in sorted(lengths)]
    with tqdm(total=len(sets) * len(stream.tokens), desc=f"measuring {name}", unit="token", unit_scale=True) as bar:
        for rows in sets:
            nats, counts = torch.zeros(2, rows.block_size, dtype=torch.float64)
            for batch in DataLoader(rows, batch_size=max(1, POSITIONS // rows.block_size)):
                scored = batch["labels"] != IGNORED
                position = batch["position_ids"][scored]
                nats.index_add_(0, position, _nats(model, batch).cpu()[scored].double())
                counts.index_add_(0, position, torch.ones_like(position, dtype=torch.float64))
                bar.update(scored.numel())
            by_length[rows.block_size] = float(nats.sum() / counts.sum())
    model.train(was_training)
    return ContextLoss(by_length, _binned(nats, counts))


def _nats(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T) float32: of each token given those before it in its piece, 0 where there are none.

    Rows are read end to end, POSITIONS tokens at a time, the state carried: of long ones no more is in memory.
    """
    ids, head = batch["input_ids"].flatten().to(model.device), model.get_output_embeddings()
    begins = (batch["position_ids"].flatten() == 0).nonzero()[:, 0]
    bounds = torch.cat([begins, torch.tensor([len(ids)])])
    nats, cache = [], None
    for begin, end, inside, continues in chunks(bounds, POSITIONS):
        outputs = model.base_model(
            input_ids=ids[None, begin:end],
            cu_seq_lens_q=inside,
            past_key_values=cache if continues else None,
            use_cache=True,
        )
        cache = outputs.past_key_values
        following = F.pad(ids[begin + 1 : end + 1], (0, end - begin - len(ids[begin + 1 : end + 1])))
        nats.append(F.cross_entropy(head(outputs.last_hidden_state[0]).float(), following, reduction="none"))
    of_next = torch.cat(nats).view(batch["labels"].shape)
    return F.pad(of_next[:, :-1], (1, 0)).masked_fill(batch["labels"].to(model.device) == IGNORED, 0)


def _binned(nats: Tensor, counts: Tensor) -> dict[int, float]:
    """Means over positions 1, 2-3, 4-7, ...: as many as there are before the next power of two."""
    ends = [2**i for i in range(1, 64) if 2**i < len(nats)] + [len(nats)]
    bins = {}
    for begin, end in zip([1, *ends[:-1]], ends, strict=True):
        if counts[begin:end].sum() > 0:
            bins[end - 1] = float(nats[begin:end].sum() / counts[begin:end].sum())
    return bins


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
