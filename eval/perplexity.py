"""Bits per byte and perplexity of any text under an RWKV, and how its loss falls along the text.

    python -m rwkv_eval.perplexity --model MODEL_FOLDER --file valid.txt
    python -m rwkv_eval.perplexity --file book.txt --window 512 --output results/

Every document is read once from its first token to its last, with the recurrent state carried all along: whatever its
length, no token is left out or seen without what came before it. Beside it stands what models with a window get: the
same documents cut into windows, each read with one token before it, the last one reaching back (lm-evaluation-harness
and the papers that use it count so).

What counts: a document starts with one token `<|endoftext|>` that is given, not predicted. Each token of its text is
predicted and scored; the end of the document is not. Bits per byte is then the sum of -log2 p(token) divided by the
UTF-8 bytes of the texts; perplexity is per token.

With --output, DIR/perplexity.json and .png have the loss by position in the document.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from modeling_rwkv import generation
from rwkv_eval.documents import read_documents
from rwkv_eval.losses import CHUNK, PositionLosses, token_losses


@dataclass
class Arguments:
    """What to measure."""

    file: str = field(metadata={"help": "UTF-8 text, documents separated by <|endoftext|>"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id; default: the model in the box"})
    window: int | None = field(default=None, metadata={"help": "tokens; default: the model's context_length"})
    chunk: int = field(default=CHUNK, metadata={"help": "tokens in one forward pass; changes no result"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, ..."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ...; auto is float32 on a CPU"})
    output: str | None = field(default=None, metadata={"help": "folder for perplexity.json and perplexity.png"})
    json: bool = field(default=False, metadata={"help": "print one JSON object"})


@dataclass(frozen=True)
class Measure:
    """Sums over texts; `bits_per_byte` and `perplexity` (per token) follow from them.

    by_position: from a position in the document to the mean loss, in nats, from half of it on.
    """

    nats: float
    tokens: int
    bytes: int
    by_position: dict[int, float]

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    def to_dict(self) -> dict[str, Any]:
        return {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity} | asdict(self)


@dataclass(frozen=True)
class Piece:
    """Tokens that are read without any before them; `scored` says which of them count, by position in the document."""

    tokens: list[int]
    scored: range


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    window: int | None = None,
    chunk: int = CHUNK,
) -> Measure:
    """Measure `documents`, each read in one pass, or in windows of so many tokens.

    Raises:
        ValueError: `window` or `chunk` is below 1, the documents have no tokens, or the tokenizer has neither a first
            nor a last token.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("the tokenizer has no token to start a document with; give it a bos_token")
    for name, tokens in (("window", window), ("chunk", chunk)):
        if tokens is not None and tokens < 1:
            raise ValueError(f"{name} is {tokens}; it must be at least 1 token")
    losses, size = PositionLosses(), 0
    waiting: list[Piece] = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        size += len(text.encode("utf-8"))
        waiting += pieces([start, *ids], window)
        if sum(len(piece.tokens) for piece in waiting) >= chunk:
            _score(model, waiting, losses, chunk)
            waiting = []
    if waiting:
        _score(model, waiting, losses, chunk)
    if not losses.tokens:
        raise ValueError("there is nothing to measure; give some text")
    return Measure(losses.nats, losses.tokens, size, losses.means())


def pieces(tokens: list[int], window: int | None) -> Iterator[Piece]:
    """A document, its first token given, as it is, or cut so that a model reads `window` tokens at a time."""
    window = window or len(tokens)
    for first in range(1, len(tokens), window):
        end = min(first + window, len(tokens))
        yield Piece(tokens[max(0, end - 1 - window) : end], range(first, end))


def _score(model: PreTrainedModel, batch: list[Piece], losses: PositionLosses, chunk: int) -> None:
    """Add the losses of what is scored in `batch`."""
    lengths = torch.tensor([0] + [len(piece.tokens) for piece in batch])
    ends = lengths.cumsum(0)
    nats = token_losses(model, torch.tensor([token for piece in batch for token in piece.tokens]), ends, chunk)
    for end, piece in zip(ends[1:].tolist(), batch, strict=True):
        losses.add(torch.tensor(piece.scored), nats[end - len(piece.scored) : end])


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Write perplexity.json and perplexity.png, whole or not at all."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("carried", "state carried"), ("windowed", f"windows of {results['window']:,} tokens")):
        losses = results[name]["by_position"]
        axes.plot(list(losses), list(losses.values()), marker=".", label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position of the token in its document", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    for path in (folder / "perplexity.json", folder / "perplexity.png"):
        unfinished = path.with_name(path.name + ".unfinished")
        if path.suffix == ".json":
            unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        else:
            figure.savefig(unfinished, dpi=120, format="png")
        os.replace(unfinished, path)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        [Arguments], prog="python -m rwkv_eval.perplexity", description=__doc__.partition("\n")[0]
    )
    (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    try:
        documents = list(read_documents(args.file))
        device = generation.find_device(args.device)
        with generation.quiet():
            model, tokenizer = generation.load(args.model, device, generation.find_dtype(args.dtype, device))
        window = model.config.context_length if args.window is None else args.window
        reading = {"carried": None, "windowed": window}
        measured = {
            name: measure(model, tokenizer, tqdm(documents, desc=name, unit="document"), length, args.chunk)
            for name, length in reading.items()
        }
        about = {"model": str(model.name_or_path), "file": args.file, "documents": len(documents), "window": window}
        results = about | {name: found.to_dict() for name, found in measured.items()}
        if args.output is not None:
            save(results, Path(args.output))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    if args.json:
        print(json.dumps(results))
        return
    for name, found in measured.items():
        how = "state carried" if name == "carried" else f"windows of {window:,} tokens"
        print(f"{found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:.3f}: {how}")
    print(f"{len(documents):,} documents, {found.tokens:,} tokens, {found.bytes:,} bytes")


if __name__ == "__main__":
    main()
