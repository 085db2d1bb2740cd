"""The models that `model.py` compares; the RWKV-4 ones hold the same random weights.

A side does two jobs, or one of them: ``prefill(ids)`` gives all logits (B, T, V) without gradients; ``train(ids)``,
one forward pass with labels and one backward pass, gives the gradients by name.
"""

import contextlib
import gc
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig
from transformers import RwkvConfig as BuiltinConfig
from transformers import RwkvForCausalLM as BuiltinRwkv
from transformers.utils.logging import disable_progress_bar

from modeling_rwkv import RwkvConfig, RwkvForCausalLM
from modeling_rwkv.checkpoints import folder_to_pth
from rwkv_kernels.wkv4 import empty_state

SHAPES = {  # layers, channels, vocabulary; of the Pile models, a World model, the model in the box, one for tests
    "169m": (12, 768, 50277),
    "430m": (24, 1024, 50277),
    "1b5": (24, 2048, 50277),
    "world-0.1b": (12, 768, 65536),
    "box": (6, 224, 4096),
    "tiny": (2, 64, 503),
}


class Transformers:
    """A model class of transformers, and so this project's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def can(self, job: str) -> bool:
        return True

    def forget(self) -> None:
        """Give back the memory of gradients."""
        self.model.zero_grad(set_to_none=True)

    def prefill(self, ids: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(input_ids=ids).logits

    def train(self, ids: Tensor) -> dict[str, Tensor]:
        self.model.train()
        self.forget()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {
            name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.grad is not None
        }


class WithoutWkv(Transformers):
    """This project's model with ``value`` in place of the operator's output: what is left is what others cost too."""

    def prefill(self, ids: Tensor) -> Tensor:
        with mock.patch("modeling_rwkv.modeling_rwkv.wkv4", _value):
            return super().prefill(ids)

    def train(self, ids: Tensor) -> dict[str, Tensor]:
        with mock.patch("modeling_rwkv.modeling_rwkv.wkv4", _value):
            return super().train(ids)


class _Value(torch.autograd.Function):
    """``value``; and its gradient for ``key`` too, so that the matrices before both are still differentiated."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


def _value(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return _Value.apply(key, value), empty_state(key, key.shape[0]) if state is None else state


class Official:
    """The `rwkv` package, which has no batches and no gradients."""

    def __init__(self, path: Path, strategy: str) -> None:
        os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}
        from rwkv.model import RWKV  # reads the environment when it is imported

        with contextlib.redirect_stdout(io.StringIO()):
            self.model = RWKV(str(path.with_suffix("")), strategy)

    def can(self, job: str) -> bool:
        return job == "prefill"

    def forget(self) -> None:
        """It keeps nothing."""

    def prefill(self, ids: Tensor) -> Tensor:
        return torch.stack([self.model.forward(row.tolist(), None, full_output=True)[0] for row in ids])


def ours(shape: str, seed: int, dtype: torch.dtype, device: str = "cpu") -> Transformers:
    return Transformers(_random(RwkvForCausalLM, RwkvConfig, shape, seed, device).to(dtype))


def without_wkv(shape: str, seed: int, dtype: torch.dtype) -> Transformers:
    return WithoutWkv(ours(shape, seed, dtype).model)


def builtin(shape: str, seed: int, dtype: torch.dtype, device: str = "cpu") -> Transformers:
    return Transformers(_random(BuiltinRwkv, BuiltinConfig, shape, seed, device).to(dtype))


def official(shape: str, seed: int, dtype: torch.dtype) -> Official:
    """It only reads a file, so this project writes one and converts it."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours(shape, seed, torch.float32).model.save_pretrained(Path(folder) / "model")
        folder_to_pth(Path(folder) / "model", Path(folder) / "model.pth", progress=False)
        gc.collect()
        return Official(Path(folder) / "model.pth", {torch.float32: "cpu fp32", torch.bfloat16: "cpu bf16"}[dtype])


def gpt_neox(shape: str, seed: int, dtype: torch.dtype, device: str = "cpu") -> Transformers:
    """A Transformer of the same shape, as the Pythia models are: what RWKV has to compete with."""
    layers, channels, vocabulary = SHAPES[shape]
    config = GPTNeoXConfig(
        num_hidden_layers=layers,
        hidden_size=channels,
        intermediate_size=4 * channels,
        num_attention_heads=channels // 64,
        vocab_size=vocabulary,
        max_position_embeddings=2**14,  # a table of nothing: positions are rotated, a quarter of each head
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return Transformers(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa"))


@dataclass(frozen=True)
class Side:
    """How to get one, and whether it computes the same function as the others."""

    load: Callable[[str, int, torch.dtype], Transformers | Official]
    same_function: bool = True


SIDES = {  # the first is what the others are compared with
    "ours": Side(ours),
    "ours without WKV": Side(without_wkv, same_function=False),
    "built-in": Side(builtin),
    "official": Side(official),
    "GPT-NeoX": Side(gpt_neox, same_function=False),
}


def _random(model_class: type, config_class: type, shape: str, seed: int, device: str = "cpu") -> nn.Module:
    """A model whose weights depend on nothing but ``shape``, ``seed`` and ``device``.

    ``rescale_every=0``: the built-in model would otherwise halve weights when it is evaluated, and double them when it
    is trained, which is only of use in float16.
    """
    layers, channels, vocabulary = SHAPES[shape]
    config = config_class(
        num_hidden_layers=layers, hidden_size=channels, vocab_size=vocabulary, rescale_every=0, use_cache=False
    )
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            _fill(name, parameter, generator)
            parameter.copy_(parameter.bfloat16())  # numbers that every dtype has: all sides hold the same weights
    return model


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Numbers in the range of trained ones: no zeros, which would hide a mistake."""
    kind = name.rpartition(".")[2]
    if kind == "time_decay":
        parameter.uniform_(-5, 3, generator=generator)
    elif kind == "time_first":
        parameter.uniform_(-1.5, 0.5, generator=generator)
    elif kind.startswith("time_mix"):
        parameter.uniform_(0, 1, generator=generator)
    elif parameter.ndim == 1:
        parameter.normal_(0 if kind == "bias" else 1, 0.1, generator=generator)
    else:
        parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
