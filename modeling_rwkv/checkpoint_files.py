"""Files of tensors: read them safely and lazily, write them tensor by tensor, publish them whole.

Nothing here knows what an RWKV is. Tensors come back memory-mapped wherever the format allows it,
so that a checkpoint larger than memory can be read; everything is written in a staging folder and
renamed when it is complete.
"""

import errno
import json
import pickle
import re
import secrets
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.utils import CallbackIOWrapper

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class CheckpointError(ValueError):
    """Why a checkpoint cannot be converted: what is wrong, which value, and the cure."""


# -- reading --------------------------------------------------------------------------------------


def load_torch_file(path: Path) -> dict[str, Any]:
    """Load the dictionary in a file of `torch.save` (`.pth`, `.bin`), never running code from it.

    Tensors are memory-mapped, except in the format of before PyTorch 1.6 (no zip archive).

    Raises:
        CheckpointError: a missing, empty or damaged file, a pickle that would run code, or
            anything but a dictionary.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; check the path")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; download it again")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on damaged bytes; the error below says enough
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} is refused because loading it would run code ({refused[1]}); "
                "get a file of plain tensors from a source that you trust"
            ) from error
        reason = "its pickle holds more than tensors, or is damaged"
        raise CheckpointError(_unreadable(path, reason)) from error
    except Exception as error:  # on damaged bytes the unpickler raises whatever they happen to spell
        raise CheckpointError(_unreadable(path, f"{type(error).__name__}: {error}")) from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors; give a model's state dict")
    return dict(content)


def _unreadable(path: Path, reason: str) -> str:
    detail = reason.splitlines()[0][:150]
    return f"{path} is truncated or not a PyTorch checkpoint ({detail}); download it again"


def load_safetensors_file(path: Path) -> dict[str, Tensor]:
    """Load all tensors of a `.safetensors` file, memory-mapped.

    Raises:
        CheckpointError: missing or damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is missing, truncated or not safetensors ({error}); download it again"
        ) from error


def load_model_folder(folder: Path) -> dict[str, Any]:
    """Load the weights of a Hugging Face folder: safetensors if there are, else pickles.

    Raises:
        CheckpointError: no weights, a missing shard, or a damaged file.
    """
    for name, load in (
        ("model.safetensors", load_safetensors_file),
        ("pytorch_model.bin", load_torch_file),
    ):
        if (folder / name).exists():
            return dict(load(folder / name))
        if (folder / f"{name}.index.json").exists():
            tensors: dict[str, Any] = {}
            for shard in _shards_of(folder / f"{name}.index.json"):
                tensors.update(load(folder / shard))
            return tensors
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin; download the weights too")


def _shards_of(index: Path) -> list[str]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map; download it again")
    return sorted({str(shard) for shard in weight_map.values()})


def load_json(path: Path) -> dict[str, Any]:
    """Load a JSON object.

    Raises:
        CheckpointError: missing file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object; download it again")
    return content


# -- writing --------------------------------------------------------------------------------------


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return `tensor` in `dtype` (None: as it is).

    Raises:
        CheckpointError: a finite value would become infinite.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return result
    # If the extremes are finite, so is the rest: a check without temporary tensors.
    is_finite = all(bool(extreme.isfinite()) for extreme in result.aminmax())
    if not is_finite and bool((result.isinf() & ~tensor.isinf()).any()):
        raise CheckpointError(f"{name} holds values too large for {dtype_name(dtype)}; use bfloat16 or float32")
    return result


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def save_safetensors_file(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, bar: Any) -> None:
    """Write `tensors`, cast to `dtype` one by one, and advance `bar` by their bytes.

    The library's `save_file` wants all tensors of a file at once; this needs memory for one tensor,
    moves the bar at each, reports a full disk as OSError and takes tensors that share memory.
    The format: eight bytes of header length, a JSON header, the tensors end to end.
    """
    # Widest type first, as the library does it, so that every tensor stays aligned.
    names = sorted(tensors, key=lambda name: -(dtype or tensors[name].dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        kind = dtype or tensors[name].dtype
        start, end = end, end + tensors[name].numel() * kind.itemsize
        shape = list(tensors[name].shape)
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[kind],
            "shape": shape,
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in names:
            data = cast(name, tensors[name], dtype).contiguous().view(torch.uint8).numpy().data
            file.write(data)
            bar.update(data.nbytes)


def save_model_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    bar: Any,
) -> list[str]:
    """Write `model.safetensors`, or shards and their index, and return the names of those files.

    Raises:
        CheckpointError: `max_shard_size` is neither a number of bytes nor a text such as "5GB".
    """
    try:
        plan = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.numel() * (dtype or tensor.dtype).itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise CheckpointError(f"max_shard_size is {max_shard_size!r}; write it as 5GB, 500MB or 100KB") from error
    for file, names in plan.filename_to_tensors.items():
        save_safetensors_file(folder / file, {name: tensors[name] for name in names}, dtype, bar)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return list(plan.filename_to_tensors)


def save_torch_file(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, bar: Any) -> None:
    """Write a zip-format `torch.save` file and advance `bar` by the bytes written."""
    if dtype is not None:
        # torch.save wants all tensors at once: the cast ones wait in a mapped file, not in memory.
        scratch = path.with_suffix(".scratch")
        save_safetensors_file(scratch, tensors, dtype, bar)
        by_name = load_safetensors_file(scratch)
        tensors = {name: by_name[name] for name in tensors}
    try:
        with path.open("xb") as file:
            torch.save(_separate(tensors), CallbackIOWrapper(bar.update, file, "write"))
    except RuntimeError as error:
        # After a failed or interrupted write, torch fails to close its archive and reports that.
        if error.__context__ is not None:
            raise error.__context__ from None
        raise
    bar.total += path.stat().st_size - sum(tensor.nbytes for tensor in tensors.values())


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # torch.save would write the whole storage of a view, and make two names of one tensor share.
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def verify(
    path: Path,
    written: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    bar: Any,
) -> None:
    """Compare what was `written` with its `source`, cast to `dtype`, bit for bit.

    Raises:
        CheckpointError: the first tensor that differs.
    """
    for name, tensor in source.items():
        expected, found = cast(name, tensor, dtype), written.get(name)
        if found is None or not _same_bits(expected, found):
            raise CheckpointError(f"{name} did not arrive unchanged in {path}; check the disk and convert again")
        bar.update(expected.nbytes)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN is equal to itself, and 0.0 differs from -0.0.
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@contextmanager
def staged(destination: Path, needed: int) -> Iterator[Path]:
    """Yield a path in a new folder beside `destination`; on success, rename it to `destination`.

    Whatever happens, nothing unfinished is ever seen under the final name.

    Args:
        destination: absolute path of a new file, or of a folder that is new or empty.
        needed: bytes that will be written.

    Raises:
        CheckpointError: no such parent folder, not writable, or no space left.
    """
    parent = destination.parent
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is not a folder; create it first (mkdir -p {parent})")
    staging = parent / f".{destination.name}.partial-{secrets.token_hex(4)}"
    try:
        if shutil.disk_usage(parent).free < needed:
            raise OSError(errno.ENOSPC, "No space left on device")
        staging.mkdir()
        yield staging / destination.name
        (staging / destination.name).rename(destination)  # takes the place of an empty folder
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"no space left in {parent}, where {destination.name} needs {needed:,} bytes; "
                "free some space or choose another disk"
            ) from error
        raise CheckpointError(
            f"{destination} cannot be written ({error}); choose a folder that you may write to"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
