"""What the laws of quantised models are tried on: ways to quantise, and what their matrices stand for."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
off_gpu = pytest.mark.skipif(DEVICE != "cpu", reason="refused only where there is no GPU")


def config(method: str) -> Any:
    """A quantization_config of transformers."""
    if method.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        few = method.endswith("4 bits")
        # With a threshold, which columns are kept in more bits depends on all rows of a batch.
        return BitsAndBytesConfig(
            load_in_4bit=few, load_in_8bit=not few, bnb_4bit_quant_type="nf4", llm_int8_threshold=0.0
        )
    torchao = pytest.importorskip("torchao.quantization")
    group = torchao.PerGroup(32)
    kinds = {
        "int8": torchao.Int8WeightOnlyConfig(),
        "int8 in groups": torchao.Int8WeightOnlyConfig(granularity=group),
        "int4": torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
        "int4 packed": torchao.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"),
    }
    return TorchAoConfig(kinds[method])


EXACT = [  # what they round is weights
    "int8",
    "int8 in groups",
    "int4",
    pytest.param(
        "int4 packed", marks=pytest.mark.skipif(DEVICE == "cpu", reason="torchao packs 4 bits for GPUs only")
    ),
    pytest.param(
        "bitsandbytes 4 bits",
        marks=pytest.mark.skipif(DEVICE == "cpu", reason="on CPUs it evaluates by a kernel that not every width fits"),
    ),
]
METHODS = [*EXACT, "bitsandbytes 8 bits"]  # which rounds the inputs of matrices too


def quantise(folder: Path, method: str = "int8") -> Path:
    """A copy of a model's folder, quantised, in bfloat16."""
    new = Path(shutil.copytree(folder, folder.with_name(f"{folder.name} in {method}")))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(method), dtype=torch.bfloat16)
    model.save_pretrained(new)
    return new


def dequantised(matrix: nn.Linear) -> Tensor:
    """The numbers that the weight of a quantised matrix stands for, (outputs, inputs)."""
    weight = matrix.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if type(weight).__name__ == "Int8Params":
        numbers, scale = (weight.data, matrix.state.SCB) if weight.CB is None else (weight.CB, weight.SCB)
        return numbers.float() * scale[:, None] / 127
    if type(weight).__name__ == "Int4TilePackedTo4dTensor":  # known by its products with unit vectors alone
        return matrix(torch.eye(matrix.in_features, dtype=weight.dtype, device=weight.device)).T
    return weight.dequantize()
