"""RWKV-4 checkpoints: a BlinkDL `.pth` file to a Hugging Face folder and back, bit for bit.

One table of names (checkpoint_names.py) drives both directions, every size is read from the tensors, and nothing
appears under the final name before it has been read back and compared with its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

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
from modeling_rwkv.checkpoint_names import check_is_rwkv4_weights, match_tensors
from modeling_rwkv.checkpoint_tokenizer import find_stop_strings, tokenizer_files
from modeling_rwkv.configuration_rwkv import RwkvConfig

__all__ = ["CheckpointError", "ConversionReport", "convert", "folder_to_pth", "pth_to_folder"]


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
    chat: str | None = None,
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
        if tokenizer is not None or vocab is not None or chat is not None:
            raise CheckpointError("a .pth file cannot hold a tokenizer; leave it and its chat template out")
        return folder_to_pth(source, destination, dtype=dtype, progress=progress)
    return pth_to_folder(
        source,
        destination,
        tokenizer=tokenizer,
        vocab=vocab,
        chat=chat,
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
    chat: str | None = None,
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
        chat: the chat template to put there: "world", "raven", "instruct" or "none"; generation then stops where it
            says. None means World's with `vocab`, and what a folder of `tokenizer` has, stop strings included.
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
    check_is_rwkv4_weights(content, source)
    names, sizes = match_tensors(content, "pth", source)
    tensors = {name.hub: content[name.pth].detach() for name in names}
    nbytes = _bytes_by_dtype(tensors, kind)
    settings: dict[str, Any] = {**sizes, "context_length": context_length}
    config = RwkvConfig(**settings, architectures=["RwkvForCausalLM"], dtype=next(iter(nbytes)))
    extra = tokenizer_files(tokenizer, vocab, chat, config)
    generation = GenerationConfig.from_model_config(config)
    generation.stop_strings = find_stop_strings(tokenizer, vocab, chat)

    needed = sum(nbytes.values())
    with staged(destination, needed) as folder, _bar(source, 2 * needed, progress) as bar:
        folder.mkdir()
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
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
    names, sizes = match_tensors(content, "hub", source)
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
