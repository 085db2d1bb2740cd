"""The tensors of an RWKV-4 checkpoint: what BlinkDL and the Hub call them, and their shapes.

Symbols in shapes: V vocabulary, D hidden size, A attention hidden size, F intermediate size.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from modeling_rwkv.checkpoint_files import SAFETENSORS_DTYPES, CheckpointError


class Name(NamedTuple):
    """One tensor: its name in a `.pth` file, its name on the Hub, its shape."""

    pth: str
    hub: str
    shape: str


_FIRST = (
    Name("emb.weight", "rwkv.embeddings.weight", "V D"),
    Name("blocks.0.ln0.weight", "rwkv.blocks.0.pre_ln.weight", "D"),
    Name("blocks.0.ln0.bias", "rwkv.blocks.0.pre_ln.bias", "D"),
)
_BLOCK = (
    Name("ln1.weight", "ln1.weight", "D"),
    Name("ln1.bias", "ln1.bias", "D"),
    Name("ln2.weight", "ln2.weight", "D"),
    Name("ln2.bias", "ln2.bias", "D"),
    Name("att.time_decay", "attention.time_decay", "A"),
    Name("att.time_first", "attention.time_first", "A"),
    Name("att.time_mix_k", "attention.time_mix_key", "1 1 D"),
    Name("att.time_mix_v", "attention.time_mix_value", "1 1 D"),
    Name("att.time_mix_r", "attention.time_mix_receptance", "1 1 D"),
    Name("att.key.weight", "attention.key.weight", "A D"),
    Name("att.value.weight", "attention.value.weight", "A D"),
    Name("att.receptance.weight", "attention.receptance.weight", "A D"),
    Name("att.output.weight", "attention.output.weight", "D A"),
    Name("ffn.time_mix_k", "feed_forward.time_mix_key", "1 1 D"),
    Name("ffn.time_mix_r", "feed_forward.time_mix_receptance", "1 1 D"),
    Name("ffn.key.weight", "feed_forward.key.weight", "F D"),
    Name("ffn.receptance.weight", "feed_forward.receptance.weight", "D D"),
    Name("ffn.value.weight", "feed_forward.value.weight", "D F"),
)
_LAST = (
    Name("ln_out.weight", "rwkv.ln_out.weight", "D"),
    Name("ln_out.bias", "rwkv.ln_out.bias", "D"),
    Name("head.weight", "head.weight", "V D"),
)
_SIZES = {
    "V": "vocab_size",
    "D": "hidden_size",
    "A": "attention_hidden_size",
    "F": "intermediate_size",
}


def _names(layers: int) -> list[Name]:
    """The whole table of a model with so many blocks, in the order of a `.pth` file."""
    blocks = [
        Name(f"blocks.{n}.{row.pth}", f"rwkv.blocks.{n}.{row.hub}", row.shape) for n in range(layers) for row in _BLOCK
    ]
    return [*_FIRST, *blocks, *_LAST]


def match_tensors(
    tensors: Mapping[str, Any], side: Literal["pth", "hub"], source: Path
) -> tuple[list[Name], dict[str, int]]:
    """Find every tensor of the table in `tensors`, and the sizes of the model from their shapes.

    Raises:
        CheckpointError: a missing or unknown tensor, a shape that contradicts the others, a type
            that is no floating-point type.
    """
    block = re.compile(r"(?:rwkv\.)?blocks\.(\d+)\.")
    layers = len({found[1] for name in tensors if (found := block.match(name))})
    names = _names(max(1, layers))
    wanted = {getattr(row, side): row.shape for row in names}
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(
            f"{source} has no tensor {missing[0]} ({len(missing)} of {len(wanted)} are missing); "
            "give a complete RWKV-4 checkpoint"
        )
    if any(".initial_state." in name for name in tensors):
        raise CheckpointError(
            f"{source} begins with a state, which a .pth file cannot hold; save the state as a file of its own "
            "(rwkv.initial_state.cache().save), then the model after set_initial_state(None)"
        )
    if unknown := [name for name in tensors if name not in wanted]:
        raise CheckpointError(
            f"{source} has a tensor {unknown[0]} that RWKV-4 does not know "
            f"({len(unknown)} in all); remove it, or give an unmodified RWKV-4 checkpoint"
        )
    sizes = {"1": 1}
    for name, shape in wanted.items():
        _check_tensor(name, tensors[name], shape, sizes, source)
    by_field = {field: sizes[symbol] for symbol, field in _SIZES.items()}
    return names, by_field | {"num_hidden_layers": layers}


def _check_tensor(name: str, tensor: Any, shape: str, sizes: dict[str, int], source: Path) -> None:
    """Check one tensor against `shape`; a symbol met for the first time enters `sizes`."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in SAFETENSORS_DTYPES:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointError(f"{name} in {source} is {found}, not a floating-point tensor; give unquantized weights")
    symbols = shape.split()
    fits = tensor.ndim == len(symbols) and tensor.numel() > 0
    for symbol, size in zip(symbols, tensor.shape, strict=False):
        fits = fits and size == sizes.setdefault(symbol, size)
    if not fits:
        expected = ", ".join(str(sizes.get(symbol, symbol)) for symbol in symbols)
        raise CheckpointError(
            f"{name} in {source} has shape {tuple(tensor.shape)} where the other tensors ask for "
            f"({expected}); give an unmodified RWKV-4 checkpoint"
        )


def check_is_rwkv4_weights(content: Mapping[str, Any], source: Path) -> None:
    """Say what a `.pth` file is when it is something else that people have.

    Raises:
        CheckpointError: a file rewritten for ChatRWKV, a trainer's checkpoint, another generation.
    """
    if marks := [key for key in ("_strategy", "_version", "_rescale_layer") if key in content]:
        raise CheckpointError(
            f"{source} was already rewritten for ChatRWKV (it holds {marks[0]}) and its weights "
            "are not the originals any more; convert the original .pth file"
        )
    for key in ("state_dict", "model", "module"):
        if isinstance(content.get(key), Mapping):
            raise CheckpointError(
                f"{source} is a trainer's checkpoint with the weights under {key!r}; save those "
                f"alone first: torch.save(torch.load(path, weights_only=True)[{key!r}], new_path)"
            )
    if generation := _other_generation(content):
        raise CheckpointError(
            f"{source} is an RWKV-{generation} checkpoint and only RWKV-4 is supported here; give an RWKV-4 checkpoint"
        )


def _other_generation(content: Mapping[str, Any]) -> int | None:
    """The generation of a checkpoint that is newer than RWKV-4, told by its tensors."""
    keys = [str(key) for key in content]
    if any(key.endswith((".att.x_r", ".att.r_k")) for key in keys):
        return 7
    if any(".time_maa_" in key for key in keys):
        return 6
    decays = [content[key] for key in keys if key.endswith(".att.time_decay")]
    if any(".ln_x." in key for key in keys) or any(getattr(d, "ndim", 1) > 1 for d in decays):
        return 5
    return None
