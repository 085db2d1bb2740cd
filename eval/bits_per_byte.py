"""Bits per byte of a text under a causal language model, one document at a time.

    python -m rwkv_eval.bits_per_byte --model MODEL_FOLDER --file valid.txt
    python -m rwkv_eval.bits_per_byte --model MODEL_FOLDER --file valid.txt --chunk 256 --json

Every document is read once from its first token to its last, in chunks, with the recurrent state
carried from chunk to chunk: whatever its length, no token is left out or seen without what came
before it, and memory does not grow. The result does not depend on the size of the chunks.

What counts: a document starts with one token `<|endoftext|>` that is given, not predicted. Each
token of its text is predicted and scored; the end of the document is not. Bits per byte is then
the sum of -log2 p(token) divided by the UTF-8 bytes of the texts. (lm-evaluation-harness counts
the same way in its rolling log-likelihood.)
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import modeling_rwkv  # noqa: F401  (makes the Auto classes load this project's RWKV)
from rwkv_eval.documents import read_documents


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(metadata={"help": "folder or Hub id of a causal language model"})
    file: str = field(metadata={"help": "UTF-8 text, documents separated by <|endoftext|>"})
    chunk: int = field(default=1024, metadata={"help": "tokens in one forward pass"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ..."})
    dtype: str = field(default="float32", metadata={"choices": ["float32", "bfloat16", "float16"]})
    json: bool = field(default=False, metadata={"help": "print one JSON object"})


@dataclass(frozen=True)
class Measure:
    """Sums over a text; `bits_per_byte` and `perplexity` (per token) follow from them."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    chunk: int = 1024,
) -> Measure:
    """Measure `documents`, each read in one pass with the state carried through chunks.

    Raises:
        ValueError: `chunk` is below 1, or the tokenizer has neither a first nor a last token.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("the tokenizer has no token to start a document with; give it a bos_token")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
    nats, tokens, size = 0.0, 0, 0
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        nats += document_nats(model, torch.tensor([start, *ids], device=model.device), chunk)
        tokens += len(ids)
        size += len(text.encode("utf-8"))
    return Measure(nats, tokens, size)


@torch.inference_mode()
def document_nats(model: PreTrainedModel, ids: torch.Tensor, chunk: int) -> float:
    """-log p(ids[1:] | ids[0]) in nats; ids: (T,) int64. Sums in float64, softmax in float32."""
    nats = torch.zeros((), dtype=torch.float64, device=ids.device)
    cache = None
    inputs, targets = ids[:-1], ids[1:]
    for begin in range(0, len(inputs), chunk):
        piece = inputs[begin : begin + chunk]
        output = model(input_ids=piece[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        target = targets[begin : begin + chunk]
        nats += F.cross_entropy(output.logits[0].float(), target, reduction="none").double().sum()
    return float(nats)


def _moved(model: torch.nn.Module, device: str) -> torch.nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {device!r}, which PyTorch cannot use here: choose cpu or a device that it sees"
        ) from error


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        [Arguments], prog="python -m rwkv_eval.bits_per_byte", description=__doc__.partition("\n")[0]
    )
    (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    try:
        documents = list(read_documents(args.file))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        model = _moved(model.eval(), args.device)
        bar = tqdm(documents, unit="document")
        result = measure(model, tokenizer, bar, args.chunk)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    numbers = asdict(result) | {
        "documents": len(documents),
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity,
    }
    if args.json:
        print(json.dumps(numbers))
    else:
        print(
            f"{result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.3f} "
            f"({len(documents):,} documents, {result.tokens:,} tokens, {result.bytes:,} bytes)"
        )


if __name__ == "__main__":
    main()
