"""Write a model into which an adapter is merged: an ordinary RWKV, which needs no PEFT.

rwkv merge run/adapter merged/
"""

import os
import shutil
from pathlib import Path

import torch
from peft import PeftConfig, PeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_rwkv  # noqa: F401 - the Auto classes know RWKV from here on
from rwkv_finetune.arguments import Refusal
from rwkv_finetune.run_folder import unfinished

DTYPES = ("float32", "bfloat16", "float16")


def merge(adapter: str, destination: str | Path, base: str | None = None, dtype: str = "float32") -> int:
    """The model of `adapter`, a folder or Hub id, as safetensors with its tokenizer; all of `destination` or nothing.

    Args:
        base: folder or Hub id of the adapter's base model, if it is no longer where it was in training.
        dtype: of the weights in the file. The sums are taken in float32; fewer bits round what was learned.

    Returns:
        The number of its parameters.

    Raises:
        Refusal: something is missing or in the way; says what.
    """
    destination = Path(destination)
    if dtype not in DTYPES:
        raise Refusal(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
    if destination.exists():
        raise Refusal(f"{destination} exists already; choose another folder or remove it")
    try:
        name = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError) as error:
        raise Refusal(f"{adapter} is no adapter of PEFT: it has no adapter_config.json") from error
    try:
        if getattr(AutoConfig.from_pretrained(name), "quantization_config", None):
            raise Refusal(f"the model {name} is quantized; give the one that it was quantized from with --base")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        model = PeftModelForCausalLM.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise Refusal(f"the adapter {adapter} does not go with the model {name}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(name)
    new = unfinished(destination)
    shutil.rmtree(new, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(new)
    tokenizer.save_pretrained(new)
    os.replace(new, destination)
    return model.num_parameters()
