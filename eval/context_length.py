"""Test loss against context length: what it is worth to a model to read more of a text at a time.

    python -m rwkv_eval.context_length --file valid.txt                       # the model in the box
    python -m rwkv_eval.context_length --file books.txt --model RWKV/rwkv-4-169m-pile run/8192/model \
        --lengths 64 256 1024 4096 8192 --output results/

A figure like the paper's on context length (Peng et al. 2023, arXiv:2305.13048, section 5). The same tokens are
predicted every time, in windows of each length that are read without what came before them (rwkv_eval.perplexity).
Only documents longer than the longest length count: in others more could not be read at a time.

With --output, DIR/context_length.json and .png.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from modeling_rwkv import generation
from rwkv_eval.documents import read_documents
from rwkv_eval.losses import CHUNK
from rwkv_eval.perplexity import Measure, measure

BOX = "the model in the box"


@dataclass
class Arguments:
    """What to measure."""

    file: str = field(metadata={"help": "UTF-8 text, documents separated by <|endoftext|>"})
    model: list[str] = field(default_factory=lambda: [BOX], metadata={"help": "folders or Hub ids"})
    lengths: list[int] = field(
        default_factory=lambda: [2**i for i in range(4, 12)], metadata={"help": "tokens that are read at a time"}
    )
    chunk: int = field(default=CHUNK, metadata={"help": "tokens in one forward pass; changes no result"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, ..."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ...; auto is float32 on a CPU"})
    output: str | None = field(default=None, metadata={"help": "folder for context_length.json and .png"})
    json: bool = field(default=False, metadata={"help": "print one JSON object"})


def by_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    lengths: Sequence[int],
    chunk: int = CHUNK,
    name: str = "measuring",
) -> dict[int, Measure]:
    """The measure of `documents` read so many tokens at a time, by each of `lengths`; `name` is for the progress bar.

    Raises:
        ValueError: a length or `chunk` is below 1, or no document has more tokens than the longest length.
    """
    if min(lengths) < 1:
        raise ValueError(f"lengths are {list(lengths)}; each must be at least 1 token")
    encoded = tokenizer(list(documents), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    counts = list(map(len, encoded))
    long = [text for text, count in zip(documents, counts, strict=True) if count > max(lengths)]
    if not long:
        raise ValueError(
            f"no document has more than {max(lengths):,} tokens, the longest has {max(counts):,}; "
            "give a file of longer ones, or shorter lengths"
        )
    found = {}
    for length in sorted(set(lengths)):
        texts = tqdm(long, desc=f"{name}, {length:,} tokens at a time", unit="document")
        found[length] = measure(model, tokenizer, texts, length, chunk)
    return found


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Write context_length.json and context_length.png, whole or not at all."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in results["models"].items():
        losses = found["loss"]
        (line,) = axes.plot(list(losses), list(losses.values()), marker="o", label=name)
        axes.axvline(found["context_length"], color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens read at a time (dotted: in training)", ylabel="test loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    for path in (folder / "context_length.json", folder / "context_length.png"):
        unfinished = path.with_name(path.name + ".unfinished")
        if path.suffix == ".json":
            unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        else:
            figure.savefig(unfinished, dpi=100, format="png")
        os.replace(unfinished, path)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        [Arguments], prog="python -m rwkv_eval.context_length", description=__doc__.partition("\n")[0]
    )
    (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    try:
        results = run(args)
        if args.output is not None:
            save(results, Path(args.output))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    if args.json:
        print(json.dumps(results))
        return
    for name, found in results["models"].items():
        print(f"{name}, {found['tokens']:,} tokens in documents that are longer than the longest length")
        for length, loss in found["loss"].items():
            bits = found["bits_per_byte"][length]
            print(f"{length:>8,} at a time: {loss:.4f} nats per token, {bits:.4f} bits per byte")


def run(args: Arguments) -> dict[str, Any]:
    """The losses of every model, all of which are loaded before any is measured."""
    documents = list(read_documents(args.file))
    device = generation.find_device(args.device)
    with generation.quiet():
        dtype = generation.find_dtype(args.dtype, device)
        loaded = {name: generation.load(None if name == BOX else name, device, dtype) for name in args.model}
    found: dict[str, Any] = {}
    for name, (model, tokenizer) in loaded.items():
        measured = by_length(model, tokenizer, documents, args.lengths, args.chunk, name)
        found[name] = {
            "context_length": model.config.context_length,
            "tokens": next(iter(measured.values())).tokens,
            "loss": {length: of.nats / of.tokens for length, of in measured.items()},
            "bits_per_byte": {length: of.bits_per_byte for length, of in measured.items()},
        }
    return {"file": Path(args.file).name, "models": found}


if __name__ == "__main__":
    main()
