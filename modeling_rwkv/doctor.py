"""What `rwkv doctor` finds: versions, devices, which WKV runs where, and whether it computes what it should."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modeling_rwkv import RwkvConfig, RwkvForCausalLM, demo_model_path
from modeling_rwkv.decoding import why_not
from rwkv_kernels import wkv4 as operator

_PACKAGES = ("modeling-rwkv", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What an implementation that does not work here may raise; anything else is a mistake of ours.
_FAILURES = (RuntimeError, ValueError, ImportError, OSError)


def examine() -> dict[str, Any]:
    """Everything that is known without computing anything, as JSON takes it.

    ``not_decoding`` is the reason why tokens are not computed at once there; None where they are.
    """
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "demo_model": str(demo_model_path()) if demo_model_path().is_dir() else None,
        "devices": [_describe(device) for device in devices()],
    }


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    return [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }
    else:
        found |= {
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    return found | {"not_decoding": why_not(_tiny_model().to(device))} | _implementations(device)


def _implementations(device: torch.device) -> dict[str, dict[str, str]]:
    """Which implementation of WKV runs for each dtype, and why the others do not."""
    keys = {str(dtype).removeprefix("torch."): torch.empty(1, 2, 8, dtype=dtype, device=device) for dtype in _DTYPES}
    chosen = {name: operator.choose_backend(key) for name, key in keys.items()}
    others = [backend for backend in operator.BACKENDS if backend not in chosen.values()]
    return {"wkv": chosen, "not_wkv": {backend: _why_not(backend, device) for backend in others}}


def _why_not(backend: str, device: torch.device) -> str:
    """The reason that the implementation gives when it is asked for, or else what it is."""
    if backend in operator.NATIVE and backend != device.type:
        return operator.BACKENDS[backend]
    try:
        operator.wkv4(*_inputs(device, torch.float32, time=3), backend=backend)
    except _FAILURES as error:
        return _first_line(error)
    return operator.BACKENDS[backend]


# -- self-test -------------------------------------------------------------------------------------


def self_test() -> Iterator[dict[str, Any]]:
    """Laws of the operator on every device, then one of the model; each with its outcome, as JSON takes it."""
    for device in devices():
        for dtype in (torch.float32, torch.bfloat16):
            where = f"{str(dtype).removeprefix('torch.')} on {device}"
            yield _try(f"WKV equals its float64 reference, {where}", partial(_accuracy, device, dtype))
        yield _try(f"WKV in two parts equals WKV in one, float32 on {device}", partial(_split, device))
        yield _try(f"a padded batch equals its rows, float32 on {device}", partial(_padding, device))
        yield _try(f"a token computed at once equals the modules', float32 on {device}", partial(_decoding, device))


def _try(name: str, measure: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    """Run a law that measures an error and its limit."""
    start = time.perf_counter()
    try:
        error, limit = measure()
        passed, detail = error <= limit, f"error {error:.1e}, at most {limit:.1e}"  # NaN is not passed
    except _FAILURES as failure:
        passed, detail = False, _first_line(failure)
    return {"name": name, "passed": passed, "detail": detail, "seconds": round(time.perf_counter() - start, 3)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _random(*shape: int) -> Tensor:
    """Reproducible, and leaves the random numbers of the program alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _inputs(
    device: torch.device, dtype: torch.dtype, time: int, channels: int = 40
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """time_decay, time_first, key and value of two rows, from channels that forget at once to some that hardly do."""
    decay, first = torch.linspace(-6, 2, channels, dtype=torch.float64), _random(channels)
    key, value = 4 * _random(2, time, channels), _random(time, 2, channels).transpose(0, 1)
    return decay.to(device, dtype), first.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


def _accuracy(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Error of the operator, which may be twice that of the sequential reference in the same dtype."""
    inputs = _inputs(device, dtype, time=67)
    exact, _ = operator.wkv4_reference(*map(Tensor.double, inputs))
    sequential, _ = operator.wkv4_reference(*inputs)
    output, _ = operator.wkv4(*inputs)
    return _distance(output, exact), 2 * _distance(sequential, exact) + 1e-6


def _split(device: torch.device) -> tuple[float, float]:
    decay, first, key, value = _inputs(device, torch.float32, time=67)
    whole, _ = operator.wkv4(decay, first, key, value)
    begin, state = operator.wkv4(decay, first, key[:, :29], value[:, :29])
    end, _ = operator.wkv4(decay, first, key[:, 29:], value[:, 29:], state)
    return _distance(torch.cat([begin, end], dim=1), whole), 1e-4


@torch.no_grad()
def _padding(device: torch.device) -> tuple[float, float]:
    """Logits of texts of 3, 7 and 5 tokens, padded on the left, against each text alone."""
    model = _tiny_model().to(device)
    lengths, longest = (3, 7, 5), 7
    ids = torch.arange(3 * longest, device=device).view(3, longest) * 5 % model.config.vocab_size
    mask = torch.stack([torch.arange(longest, device=device) >= longest - length for length in lengths]).long()
    batch = model(input_ids=ids, attention_mask=mask).logits
    alone = [model(input_ids=row[None, longest - n :]).logits[0] for row, n in zip(ids, lengths, strict=True)]
    errors = [_distance(row[longest - len(one) :], one) for row, one in zip(batch, alone, strict=True)]
    return torch.tensor(errors).max().item(), 1e-4  # the maximum of a tensor does not overlook NaN


@torch.no_grad()
def _decoding(device: torch.device) -> tuple[float, float]:
    """Logits of the last of five tokens, alone and all at once."""
    model, ids = _tiny_model().to(device), torch.arange(10, device=device).view(2, 5)
    past = model(input_ids=ids[:, :4]).past_key_values
    return _distance(model(input_ids=ids[:, 4:], past_key_values=past).logits, model(ids).logits[:, 4:]), 1e-4


@torch.no_grad()
def _tiny_model() -> RwkvForCausalLM:
    config = RwkvConfig(vocab_size=29, hidden_size=24, num_hidden_layers=2, bos_token_id=None, eos_token_id=None)
    model = RwkvForCausalLM(config).eval()
    for x in model.parameters():
        x.copy_(_random(*x.shape) / x.shape[-1] ** 0.5)  # the paper's initialisation is zero in many places
    return model


def _distance(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item()
