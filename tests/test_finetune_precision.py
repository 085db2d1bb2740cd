"""Laws of fine-tuning in fewer bits: quantised weights, and products in bfloat16."""

import shutil
from pathlib import Path

import pytest
import torch
from finetuning import history, logits, own_cache, swapped_words, tiny_model, train  # noqa: F401 - fixtures
from models import agree, make, same, text
from peft import AutoPeftModelForCausalLM
from quantizing import dequantised, on_gpu, quantise
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from rwkv_finetune import lora, supervised


@pytest.mark.parametrize("load_in", ["int8", pytest.param("4bit", marks=on_gpu)])
def test_an_adapter_has_the_gradients_of_the_quantised_weights(load_in, base, data, tmp_path):
    """Also after an evaluation, where a library may change how it keeps the weights."""
    pytest.importorskip(supervised.LIBRARIES[load_in])
    result = train("lora", base, data, tmp_path / "run", load_in=load_in, train_vectors=True)
    losses = [entry["eval_loss"] for entry in history(tmp_path / "run") if "eval_loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    args = supervised.SupervisedArguments(output_dir=str(tmp_path / "no"), report_to="none")
    quantised = lora.build(lora.LoraArguments(model=str(base), load_in=load_in), args)
    whole = lora.build(lora.LoraArguments(model=str(base)), args).to(quantised.device)
    for model in (quantised, whole):
        model.load_adapter(result, "default", is_trainable=True)
    for few, all_bits in zip(quantised.modules(), whole.modules(), strict=False):
        if hasattr(few, "base_layer"):
            all_bits.base_layer.weight.data = dequantised(few.base_layer).float()
    ids = torch.arange(2, 60, device=quantised.device)[None]
    with torch.no_grad():
        evaluated = quantised.eval()(ids).logits
        agree(quantised.train()(ids).logits, evaluated)
    for model in (quantised, whole.train()):
        model(input_ids=ids, labels=ids).loss.backward()
    agree(trained_gradients(quantised), trained_gradients(whole), rtol=1e-3)


def test_an_adapter_trains_beside_a_model_that_was_saved_quantised(base, data, tmp_path):
    model = quantise(Path(shutil.copytree(base, tmp_path / "tiny")))
    result = train("lora", model, data, tmp_path / "run", bf16=True)
    losses = [entry["eval_loss"] for entry in history(tmp_path / "run") if "eval_loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    args = supervised.SupervisedArguments(output_dir=str(tmp_path / "no"), report_to="none")
    built = lora.build(lora.LoraArguments(model=str(model)), args)
    same(logits(built), logits(AutoModelForCausalLM.from_pretrained(model)))
    adapted = AutoPeftModelForCausalLM.from_pretrained(result)
    assert adapted.get_base_model().is_quantized
    built.load_adapter(result, "default")
    evaluated = logits(built)
    same(logits(adapted), evaluated)
    with torch.no_grad():
        same(built.train()(torch.arange(2, 60)[None]).logits, evaluated)


def trained_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.grad for name, x in model.named_parameters() if "lora_" in name}


def test_low_precision_keeps_what_is_trained_in_float32(base, data, tmp_path):
    result = train("lora", base, data, tmp_path / "run", bf16=True, max_steps=2, train_vectors=True)
    assert {x.dtype for x in load_file(result / "adapter_model.safetensors").values()} == {torch.float32}


class InFloat32(nn.Module):
    """A matrix that answers in float32 whatever it is asked in, as some quantised ones do under autocast."""

    def __init__(self, matrix: nn.Linear):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.matrix(x.float())


MATRICES = [f"attention.{name}" for name in ("key", "value", "receptance", "output")]
MATRICES += [f"feed_forward.{name}" for name in ("key", "value", "receptance")]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_matrices_need_not_agree_on_the_dtype_of_their_answers(matrix, packed):
    """Quantised ones do not always follow autocast, where others do."""
    model, ids = make("wide attention").train(), text(2, 37, 53)
    batch = {"input_ids": ids, "labels": ids}
    if packed:
        batch["position_ids"] = torch.cat([torch.arange(n) for n in (5, 32, 36, 1)]).view(2, 37)
    found = []
    for mixed in (False, True):
        if mixed:
            for block in model.rwkv.blocks:
                block.set_submodule(matrix, InFloat32(block.get_submodule(matrix)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        found.append(torch.cat([x.grad.flatten() for x in model.parameters()]))
        model.zero_grad(set_to_none=True)
    assert found[1].norm() > 0
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()  # some dozen roundings of 0.4%
