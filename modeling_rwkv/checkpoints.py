"""RWKV-4 checkpoints: a BlinkDL `.pth` file to a Hugging Face folder and back, bit for bit.

One table of names drives both directions, every size is read from the tensors, and nothing appears
under the final name before it has been read back and compared with its source.
Symbols in shapes: V vocabulary, D hidden size, A attention hidden size, F intermediate size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from modeling_rwkv.checkpoint_files import (
    SAFETENSORS_DTYPES,
    CheckpointError,
    dtype_name,
    load_json,
    load_model_folder,
    load_torch_file,
    save_model_folder,
    save_torch_file,
    staged,
    verify,
)
from modeling_rwkv.checkpoint_tokenizer import tokenizer_files
from modeling_rwkv.configuration_rwkv import RwkvConfig

__all__ = ["CheckpointError", "ConversionReport", "convert", "folder_to_pth", "pth_to_folder"]


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


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote."""

    source: Path
    destination: Path
    files: tuple[Path, ...]  # the weights: one file, or the shards
    tensors: int
    parameters: int
    nbytes: int  # of all tensors as written
    dtypes: tuple[str, ...]  # as written, the one with most bytes first
    sizes: dict[str, int]  # vocab_size, hidden_size, ..., num_hidden_layers
    tokenizer: Path | None  # the tokenizer.json that was written, if any


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    vocab: str | PathLike[str] | None = None,
    context_length: int = 1024,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> ConversionReport:
    """Convert a `.pth` file to a Hugging Face folder, or a folder to a `.pth` file.

    See `pth_to_folder` and `folder_to_pth`; what `source` is decides between them.

    Raises:
        CheckpointError: nothing was written; the sentence says why.
    """
    source, destination = Path(source), Path(destination)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; check the path")
    if source.is_dir():
        if tokenizer is not None or vocab is not None:
            raise CheckpointError("a .pth file cannot hold a tokenizer; leave the tokenizer out")
        return folder_to_pth(source, destination, dtype=dtype, progress=progress)
    return pth_to_folder(
        source,
        destination,
        tokenizer=tokenizer,
        vocab=vocab,
        context_length=context_length,
        dtype=dtype,
        max_shard_size=max_shard_size,
        progress=progress,
    )


def pth_to_folder(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    vocab: str | PathLike[str] | None = None,
    context_length: int = 1024,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> ConversionReport:
    """Convert a BlinkDL RWKV-4 `.pth` file to a Hugging Face folder of safetensors.

    Args:
        source: file of `torch.save`; tensors of float64, float32, float16 or bfloat16, even mixed.
        destination: folder that does not exist yet, or is empty.
        tokenizer: a `tokenizer.json`, or a folder with one, to put beside the weights.
        vocab: instead, the vocabulary file of a World model; "world" is the one inside the installed `rwkv` package.
        context_length: for the configuration, since a `.pth` file does not hold it.
        dtype: name of the type to cast every tensor to; None keeps each tensor as it is.
        max_shard_size: bytes, or a text such as "5GB".
        progress: show a progress bar.

    Raises:
        CheckpointError: nothing was written; the sentence says why.
    """
    source, destination = Path(source), Path(destination).resolve()
    if source.suffix == ".safetensors":
        raise CheckpointError(f"{source} is one file of a folder; give the folder {source.parent}")
    if destination.suffix == ".pth":
        raise CheckpointError(f"{destination} is not a folder's name; leave out .pth")
    _check_is_free(destination, folder=True)
    kind = _parse_dtype(dtype)
    content = load_torch_file(source)
    _check_is_rwkv4_weights(content, source)
    names, sizes = _match(content, "pth", source)
    tensors = {name.hub: content[name.pth].detach() for name in names}
    nbytes = _bytes_by_dtype(tensors, kind)
    settings: dict[str, Any] = {**sizes, "context_length": context_length}
    config = RwkvConfig(**settings, architectures=["RwkvForCausalLM"], dtype=next(iter(nbytes)))
    extra = tokenizer_files(tokenizer, vocab, config)

    needed = sum(nbytes.values())
    with staged(destination, needed) as folder, _bar(source, 2 * needed, progress) as bar:
        folder.mkdir()
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        for file, data in extra.items():
            (folder / file).write_bytes(data)
        shards = save_model_folder(folder, tensors, kind, max_shard_size, bar)
        verify(destination, load_model_folder(folder), tensors, kind, bar)
    return ConversionReport(
        source=source,
        destination=destination,
        files=tuple(destination / shard for shard in shards),
        tensors=len(tensors),
        parameters=_count(tensors),
        nbytes=needed,
        dtypes=tuple(nbytes),
        sizes=sizes,
        tokenizer=destination / "tokenizer.json" if extra else None,
    )


def folder_to_pth(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    dtype: str | None = None,
    progress: bool = True,
) -> ConversionReport:
    """Convert a Hugging Face RWKV-4 folder to a BlinkDL `.pth` file.

    Args:
        source: folder with `config.json` and the weights as safetensors or `pytorch_model.bin`, in
            one file or in shards. Tied embeddings become a `head.weight` of their own.
        destination: file that does not exist yet, named `.pth`.
        dtype: name of the type to cast every tensor to; None keeps each tensor as it is.
        progress: show a progress bar.

    Raises:
        CheckpointError: nothing was written; the sentence says why.
    """
    source, destination = Path(source), Path(destination).resolve()
    if destination.suffix != ".pth":
        raise CheckpointError(f"{destination} must end in .pth, because {source} is a folder")
    _check_is_free(destination, folder=False)
    kind = _parse_dtype(dtype)
    config = load_json(source / "config.json")
    if (model_type := config.get("model_type")) != "rwkv":
        raise CheckpointError(
            f"{source} holds a model of type {model_type!r}, not 'rwkv'; "
            "give an RWKV-4 model, since only those are supported here"
        )
    content = load_model_folder(source)
    if config.get("tie_word_embeddings") and "rwkv.embeddings.weight" in content:
        content.setdefault("head.weight", content["rwkv.embeddings.weight"])
    names, sizes = _match(content, "hub", source)
    tensors = {name.pth: content[name.hub].detach() for name in names}
    nbytes = _bytes_by_dtype(tensors, kind)

    needed = sum(nbytes.values())
    passes = 2 if kind is None else 3
    with (
        staged(destination, (passes - 1) * needed) as file,
        _bar(source, passes * needed, progress) as bar,
    ):
        save_torch_file(file, tensors, kind, bar)
        verify(destination, load_torch_file(file), tensors, kind, bar)
    return ConversionReport(
        source=source,
        destination=destination,
        files=(destination,),
        tensors=len(tensors),
        parameters=_count(tensors),
        nbytes=needed,
        dtypes=tuple(nbytes),
        sizes=sizes,
        tokenizer=None,
    )


# -- names and shapes ------------------------------------------------------------------------------


def _names(layers: int) -> list[Name]:
    """The whole table of a model with so many blocks, in the order of a `.pth` file."""
    blocks = [
        Name(f"blocks.{n}.{row.pth}", f"rwkv.blocks.{n}.{row.hub}", row.shape) for n in range(layers) for row in _BLOCK
    ]
    return [*_FIRST, *blocks, *_LAST]


def _match(tensors: Mapping[str, Any], side: Literal["pth", "hub"], source: Path) -> tuple[list[Name], dict[str, int]]:
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


def _check_is_rwkv4_weights(content: Mapping[str, Any], source: Path) -> None:
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


# -- small parts -----------------------------------------------------------------------------------


def _check_is_free(destination: Path, *, folder: bool) -> None:
    """Refuse to overwrite: only a `folder` may exist already, if it is empty."""
    if destination.is_mount():
        raise CheckpointError(f"{destination} is a mount point; choose a new folder inside it")
    if folder and destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; remove it or choose another name")


def _parse_dtype(name: str | None) -> torch.dtype | None:
    by_name = {dtype_name(dtype): dtype for dtype in SAFETENSORS_DTYPES}
    if name is not None and name not in by_name:
        raise CheckpointError(f"dtype is {name!r}; choose one of {', '.join(by_name)}")
    return None if name is None else by_name[name]


def _bytes_by_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes to write per type's name, the most first."""
    total: dict[str, int] = {}
    for tensor in tensors.values():
        kind = dtype or tensor.dtype
        total[dtype_name(kind)] = total.get(dtype_name(kind), 0) + tensor.numel() * kind.itemsize
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _bar(source: Path, total: int, progress: bool) -> Any:
    return tqdm(
        total=total,
        desc=f"Converting {source.name}",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
