"""Random RWKV-4 checkpoints, and what it means that two are the same.

The names of BlinkDL's tensors are written out here a second time, so that no test asks the table
of the converter about itself.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor


class Shape(NamedTuple):
    vocab: int
    hidden: int
    attention: int
    ffn: int
    layers: int


SHAPES = [Shape(17, 8, 8, 32, 2), Shape(50, 12, 20, 24, 3), Shape(3, 5, 2, 7, 1)]
SMALL = Shape(11, 4, 6, 8, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def blink_state(shape: Shape = SMALL, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random RWKV-4 weights in BlinkDL's names, in the order of his files."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int, mean: float = 0.0, scale: float = 0.3) -> Tensor:
        return (mean + scale * torch.randn(size, generator=generator)).to(dtype)

    vocab, hidden, attention, ffn, layers = shape
    state = {"emb.weight": normal(vocab, hidden)}

    def norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = normal(hidden, mean=1.0), normal(hidden)

    for n in range(layers):
        block = f"blocks.{n}"
        for ln in ("ln0", "ln1", "ln2") if n == 0 else ("ln1", "ln2"):
            norm(f"{block}.{ln}")
        state[f"{block}.att.time_decay"] = normal(attention, mean=-1.0, scale=2.0)
        state[f"{block}.att.time_first"] = normal(attention)
        for mix in ("att.time_mix_k", "att.time_mix_v", "att.time_mix_r"):
            state[f"{block}.{mix}"] = normal(1, 1, hidden, mean=0.5)
        for matrix in ("key", "value", "receptance"):
            state[f"{block}.att.{matrix}.weight"] = normal(attention, hidden)
        state[f"{block}.att.output.weight"] = normal(hidden, attention)
        for mix in ("ffn.time_mix_k", "ffn.time_mix_r"):
            state[f"{block}.{mix}"] = normal(1, 1, hidden, mean=0.5)
        state[f"{block}.ffn.key.weight"] = normal(ffn, hidden)
        state[f"{block}.ffn.receptance.weight"] = normal(hidden, hidden)
        state[f"{block}.ffn.value.weight"] = normal(hidden, ffn)
    norm("ln_out")
    state["head.weight"] = normal(vocab, hidden)
    return state


def save(path: Path, content: Any = None, **kwargs: Any) -> Path:
    torch.save(blink_state() if content is None else content, path, **kwargs)
    return path


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    raw = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), raw


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert bits(one[name]) == bits(other[name]), name


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


TEXT = ["the bird sang   a\tsong", "another bird; the same song"]


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE with `<|endoftext|>` as its id 0, as GPT-NeoX's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer
