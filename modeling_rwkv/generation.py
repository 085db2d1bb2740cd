"""What `rwkv generate` does between parsing and printing: find a model, load it, write on.

Everything that a person can get wrong is a :class:`GenerateError` of one sentence, with its cure.
"""

import errno
import json
import os
import pickle
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from modeling_rwkv import demo_model_path
from modeling_rwkv.cache import RwkvCache
from modeling_rwkv.decoding import why_not
from modeling_rwkv.prefill import length_before_last_piece, read
from modeling_rwkv.remarks import no_remarks
from modeling_rwkv.streaming import TextPieces
from rwkv_kernels.build_cache import KernelWarning

SMALL_MODEL = 30_000_000  # parameters; see few_threads
DTYPES = ("float32", "bfloat16", "float16", "float64")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each perhaps in shards, with an index
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class GenerateError(ValueError):
    """Why there is no text: what is wrong, which value, and the cure."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else a draw that ``seed`` decides."""

    temperature: float
    top_p: float
    top_k: int | None
    seed: int | None

    def arguments(self) -> dict[str, Any]:
        """For `generate`; they overrule what the model's own generation_config.json says."""
        alone = {"num_beams": 1, "num_return_sequences": 1}
        if self.temperature == 0:
            return alone | {"do_sample": False}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or 0}
        return alone | chosen | {"do_sample": True}

    def plant(self) -> int | None:
        """Seed the draws to come; returns the seed, None where nothing is drawn."""
        if self.temperature == 0:
            return None
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        torch.manual_seed(seed)
        return seed


@dataclass(frozen=True)
class Generated:
    """A prompt and what came after it, in ``seconds``, of which ``first_token_seconds`` until the first token."""

    prompt: str
    continuation: str
    prompt_tokens: int
    tokens: int
    first_token_seconds: float
    seconds: float
    seed: int | None  # None: nothing was drawn

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token, None if there is no other."""
        return None if self.tokens < 2 else (self.tokens - 1) / (self.seconds - self.first_token_seconds)

    def to_dict(self) -> dict[str, Any]:
        rate = self.tokens_per_second
        return asdict(self) | {
            "text": self.prompt + self.continuation,
            "first_token_seconds": round(self.first_token_seconds, 4),
            "seconds": round(self.seconds, 4),
            "tokens_per_second": None if rate is None else round(rate, 2),
        }

    def summary(self) -> str:
        """A line for people."""
        rate, plural = self.tokens_per_second, "" if self.tokens == 1 else "s"
        line = f"{self.tokens} token{plural} after a prompt of {self.prompt_tokens} in {self.seconds:.2f} s"
        if rate is None:
            return line
        return f"{line}: the first in {self.first_token_seconds:.2f} s, then {rate:.1f} tokens/s"


def load_as_asked(name: str | None, state: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """The model, which begins with the state in a file if one is named, and its tokenizer, as options ask for them.

    Raises:
        GenerateError: one of the options cannot be had.
    """
    place = find_device(device)
    model, tokenizer = load(name, place, find_dtype(dtype, place))
    if state is not None:
        begin_with(model, state)
    return model, tokenizer


def find_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is CUDA where there is one.

    Raises:
        GenerateError: PyTorch does not know it, or does not see it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        there += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise GenerateError(
            f"device is {name!r}, which PyTorch does not know: choose auto, {', '.join(there)}"
        ) from error
    if f"{device.type}:{device.index or 0}" not in (*there, "cpu:0"):
        raise GenerateError(f"device is {name!r}, which PyTorch does not see here: choose auto, {', '.join(there)}")
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """The dtype that `--dtype` names; "auto" is float32 on a CPU and the checkpoint's own elsewhere.

    Raises:
        GenerateError: no such dtype.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise GenerateError(f"dtype is {name!r}: choose auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def load(name: str | None, device: torch.device, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer, from a folder, from the Hub, or (None) from this package.

    One that was saved quantized stays so, and in its own dtype.

    Raises:
        GenerateError: there is none, it is no RWKV, or a file of it or a package that it needs is missing or damaged.
    """
    source = str(demo_model_path()) if name is None else name
    path = Path(source)
    if name is None and not path.is_dir():
        raise GenerateError(f"the model in the box is missing ({source}): install this package again, or give --model")
    if path.exists():
        settings = _read_folder(path)
    elif _HUB_ID.fullmatch(source):
        settings = _read_hub(source)
    else:
        raise GenerateError(f"there is no folder {source}: give a model's folder or its name on the Hugging Face Hub")
    if (model_type := settings.get("model_type")) != "rwkv":
        raise GenerateError(f"{source} is a model of type {model_type!r}, not 'rwkv': give an RWKV-4 model")
    if path.exists():
        _check_files(path)
    tokenizer = _load_tokenizer(source)
    if settings.get("quantization_config"):
        dtype = "auto"  # what is not quantized must go with what is
    with explained(device):
        return _load_model(source, device, dtype).eval(), tokenizer


def begin_with(model: Any, path: str) -> None:
    """Let ``model`` begin with the state in a file.

    Raises:
        GenerateError: there is no such file, or it is no state, or of another model.
    """
    try:
        model.set_initial_state(path)
    except FileNotFoundError as error:
        raise GenerateError(f"there is no file {path}; give the state.safetensors of a state-tuning run") from error
    except ValueError as error:
        raise GenerateError(f"{error}; give a state of this model") from error


def _read_folder(path: Path) -> dict[str, Any]:
    """The config.json of a model's folder."""
    if not path.is_dir():
        convert = (
            f"convert it first (rwkv convert {path} FOLDER)" if path.suffix == ".pth" else "give a model's folder"
        )
        raise GenerateError(f"{path} is not a folder: {convert}")
    if not (path / "config.json").exists():
        raise GenerateError(f"{path} has no config.json: give a folder that save_pretrained or rwkv convert wrote")
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise GenerateError(f"{path / 'config.json'} is not JSON ({error}): get the file again") from error
    if not isinstance(settings, dict):
        raise GenerateError(f"{path / 'config.json'} holds no JSON object: get the file again")
    return settings


def _read_hub(source: str) -> dict[str, Any]:
    """The config.json of a model on the Hub."""
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
    except OSError as error:
        raise GenerateError(
            f"{source} is neither a folder nor a model that could be had from the Hugging Face Hub: "
            "check the name, and the network (HF_HUB_OFFLINE=1 allows only what was downloaded before)"
        ) from error
    return settings


def _check_files(path: Path) -> None:
    """A folder has weights and a tokenizer that may be read; transformers would say that they are not there, or make
    up an empty tokenizer."""
    for file in path.iterdir():
        if file.suffix in (".json", ".safetensors", ".bin") and file.is_file() and not os.access(file, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    if not any((path / f"{name}{index}").exists() for name in _WEIGHTS for index in ("", ".index.json")):
        raise GenerateError(f"{path} has no weights ({' or '.join(_WEIGHTS)}): get or save them too")
    if not ((path / "tokenizer.json").exists() or any(path.glob("*vocab*"))):
        raise GenerateError(f"{path} has no tokenizer.json: copy that of the model's training into it")


def _load_tokenizer(source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what the tokenizers library raises for a damaged file is a plain Exception
        raise _unreadable("tokenizer", source, error) from error


def _load_model(source: str, device: torch.device, dtype: torch.dtype | str) -> Any:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=device, trust_remote_code=False, output_loading_info=True
        )
    except torch.OutOfMemoryError:  # a RuntimeError, but not for a damaged file
        raise
    except ImportError as error:
        raise GenerateError(
            f"{source} is quantized, and its library is missing ({error}): pip install modeling-rwkv[quantize]"
        ) from error
    except (
        AttributeError,
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:  # what damaged bytes, or a config.json that says something else than the weights, lead to
        raise _unreadable("weights", source, error) from error
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random numbers in their place
        raise GenerateError(
            f"{source} has no tensor {missing[0]} ({len(missing)} are missing): get the whole checkpoint"
        )
    return model


def _unreadable(part: str, source: str, error: Exception) -> GenerateError:
    if isinstance(error, OSError) and error.errno is not None:
        return GenerateError(f"the {part} of {source} cannot be read ({error}): check the file and its permissions")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    return GenerateError(f"the {part} of {source} cannot be loaded ({reason[:200]}): get the files again")


@contextmanager
def few_threads(model: Any) -> Iterator[None]:
    """One thread for a small model on a CPU: its steps take less time than threads take to meet.

    The model in the box writes 250 tokens/s on one thread and, where another program is busy too, 3 to 80 on two.
    """
    threads = torch.get_num_threads()
    if model.device.type == "cpu" and model.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encode(model: Any, tokenizer: Any, text: str, **options: Any) -> Tensor:
    """The ids (1, n) of a text, on the device of the model.

    Raises:
        GenerateError: it is no Unicode, or has no tokens, or tokens that the model does not know.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python's stand-ins for bytes of a command line or a terminal
        raise GenerateError(f"the text {text[error.start :][:20]!a} is not UTF-8: write it in UTF-8") from error
    ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False, **options)["input_ids"]
    if ids.numel() == 0:
        raise GenerateError(f"the prompt {text!r} is nothing to this model's tokenizer: write something else")
    if int(ids.max()) >= model.config.vocab_size:
        raise GenerateError(
            f"the tokenizer gives token {int(ids.max())} but the model knows {model.config.vocab_size} tokens: "
            "put the tokenizer of the model's training beside its weights"
        )
    return ids.to(model.device)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    write: Callable[[str], object],
    progress: bool = False,
) -> Generated:
    """Write ``prompt`` and then, as they come, the pieces of its continuation.

    ``progress``: show on stderr how much of a prompt is read that is longer than the model's ``prefill_tokens``.

    Raises:
        GenerateError: the prompt is no Unicode, or has no tokens, or tokens that the model does not know.
    """
    ids = encode(model, tokenizer, prompt)
    seed = sampling.plant()
    past = RwkvCache()
    pieces: list[str] = []

    def write_piece(piece: str) -> None:
        pieces.append(piece)
        write(piece)

    streamer = TextPieces(tokenizer, write_piece)
    with explained(model.device, getattr(model, "is_quantized", False)), few_threads(model):
        why_not(model)  # kernels of the next token are compiled here, if they have to be, and not after the first one
        start = time.perf_counter()
        read(model, ids[:, : length_before_last_piece(model, ids)], past, progress=progress)
        write(prompt)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=past,
            cache_implementation=None,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **sampling.arguments(),
        )
    end = time.perf_counter()
    return Generated(
        prompt=prompt,
        continuation="".join(pieces),
        prompt_tokens=ids.shape[1],
        tokens=output.shape[1] - ids.shape[1],
        first_token_seconds=(streamer.first_token_at or end) - start,
        seconds=end - start,
        seed=seed,
    )


@contextmanager
def explained(device: torch.device, quantized: bool = False) -> Iterator[None]:
    """Errors that have their cause in the size or the numbers of a model."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise GenerateError(
            f"the model is too large for {device}: try --dtype bfloat16, or another --device"
        ) from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            if not quantized:
                raise
            # Not every library has a kernel for every device and width.
            raise GenerateError(
                f"the quantized weights do not work on {device} ({str(error).splitlines()[0]}): "
                "try another --device, or the model that they were quantized from"
            ) from error
        raise GenerateError(
            "the model's logits are not finite: try --dtype float32, or get the weights again"
        ) from error


@contextmanager
def quiet(debug: bool = False) -> Iterator[None]:
    """Without the bars and the advice of transformers, which are for programmers.

    Downloads keep their bars, and kernels that cannot be had are told of, in a line on stderr.
    """
    if debug:
        yield
        return
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if hub_bars:
        enable_progress_bars()
    try:
        with warnings.catch_warnings(), no_remarks():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", KernelWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
