"""Bits per byte of a text by methods that learn nothing deep: n-grams and compressors.

    python -m rwkv_eval.baselines --train train.txt --file valid.txt --tokenizer MODEL_FOLDER
    python -m rwkv_eval.baselines --train train.txt --file valid.txt --json

n-grams (ngram.py) are trained on the training text, over the tokenizer's tokens, or over bytes
without `--tokenizer`. They are measured as bits_per_byte.py measures a model: each document
starts with a given `<|endoftext|>`, all its text is scored, its end is not.

Compressors of Python's standard library get the training text first where they can look back
that far: the size of both texts less the size of the training text alone. xz sees all of it,
zlib the last 32 KiB, bz2 none. They are given whole files, separators and all.
"""

import bz2
import json
import lzma
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, HfArgumentParser

from rwkv_eval.documents import SEPARATOR, byte_count, read_documents
from rwkv_eval.ngram import NGram

BYTES_END = 256  # the symbol that ends a document of bytes


@dataclass
class Arguments:
    """What to measure."""

    train: str = field(metadata={"help": "UTF-8 text to learn from"})
    file: str = field(metadata={"help": "UTF-8 text to measure"})
    tokenizer: str | None = field(default=None, metadata={"help": "folder; default: bytes"})
    order: int = field(default=5, metadata={"help": "longest n-gram"})
    json: bool = field(default=False, metadata={"help": "print one JSON object"})


@dataclass(frozen=True)
class Symbols:
    """A way to write text as integers below `vocab_size`; `end` closes a document."""

    encode: Callable[[str], list[int]]
    vocab_size: int
    end: int
    name: str

    @classmethod
    def of(cls, folder: str | None) -> "Symbols":
        if folder is None:
            return cls(lambda text: list(text.encode("utf-8")), 257, BYTES_END, "byte")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer in {folder} has no end-of-text token; give it one")

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

        return cls(encode, len(tokenizer), tokenizer.eos_token_id, "token")


def ngram_bits_per_byte(train: list[str], documents: list[str], symbols: Symbols, order: int) -> dict[str, float]:
    """One number per order 1 to `order`, each of a model trained at that order."""
    stream = [[*symbols.encode(text), symbols.end] for text in tqdm(train, desc="reading")]
    measured = [symbols.encode(text) for text in documents]
    size = byte_count(documents)
    results = {}
    for n in tqdm(range(1, order + 1), desc="n-grams"):
        model = NGram.train(stream, n, symbols.vocab_size, symbols.end)
        bits = -sum(float(np.log2(model.score(document)).sum()) for document in measured)
        results[f"{symbols.name} {n}-gram"] = bits / size
    return results


def compressed_bits_per_byte(train: bytes, text: bytes) -> dict[str, float]:
    """Compressed size of `text` after `train`, in bits per byte of `text`."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    primed = zlib.compressobj(9, wbits=-15, zdict=train[-(1 << 15) :])
    sizes = {
        "xz, primed": xz(train + text) - xz(train),
        "bz2": len(bz2.compress(text, 9)),
        "zlib, primed": len(primed.compress(text) + primed.flush()),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        [Arguments], prog="python -m rwkv_eval.baselines", description=__doc__.partition("\n")[0]
    )
    (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    try:
        train, documents = list(read_documents(args.train)), list(read_documents(args.file))
        symbols = Symbols.of(args.tokenizer)
        started = time.perf_counter()
        results = ngram_bits_per_byte(train, documents, symbols, args.order)
        ngram_seconds = time.perf_counter() - started
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    started = time.perf_counter()
    whole = [f"\n{SEPARATOR}\n".join(texts).encode("utf-8") for texts in (train, documents)]
    results |= compressed_bits_per_byte(*whole)
    seconds = {"n-grams": ngram_seconds, "compressors": time.perf_counter() - started}
    if args.json:
        print(json.dumps({"bits_per_byte": results, "seconds": seconds}))
        return
    for name, bits in results.items():
        print(f"{name:>16}  {bits:.4f} bits per byte")
    print(", ".join(f"{name} took {s:.1f} s" for name, s in seconds.items()))


if __name__ == "__main__":
    main()
