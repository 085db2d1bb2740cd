"""Laws of quantised models: what stays as it was, and that nothing else than the numbers in the matrices changes.

Methods that round the weights and nothing else are held to the laws of the model: its logits are those of the
dequantised weights, however a text is read.
"""

import json
import subprocess
import sys

import pytest
import torch
from commands import VOCAB_SIZE, raiser, random_model, refused, rwkv, write_on  # noqa: F401 - a fixture
from models import agree, make, padded, same, text
from quantizing import DEVICE, EXACT, METHODS, config, dequantised, on_gpu, quantise
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from modeling_rwkv import RwkvForCausalLM
from modeling_rwkv.modeling_rwkv import RwkvLayerNorm
from rwkv_eval.zero_shot import sha256

# Groups of 32 inputs fit, and nothing else is round.
SHAPE = {"vocab_size": 61, "hidden_size": 64, "attention_hidden_size": 96, "intermediate_size": 160}
MATRICES = {f"attention.{name}" for name in ("key", "value", "receptance", "output")}
MATRICES |= {f"feed_forward.{name}" for name in ("key", "value", "receptance")}
NARROW = {torch.float32: {}, torch.bfloat16: {"rtol": 2**-5, "atol": 2**-4}}  # a few roundings of 2^-8


@pytest.fixture(name="plain", scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    make(SHAPE, num_hidden_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture(name="model", scope="module", params=METHODS)
def quantised_model(request, plain):
    dtype = torch.bfloat16 if "packed" in request.param else torch.float32
    return load(plain, request.param, dtype)


def load(folder, method, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config(method), dtype=dtype, device_map=DEVICE
    ).eval()


def matrices(model):
    return {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear) and name != "head"}


def whole(model, plain):
    """The model of the dequantised weights, in the dtype of the quantised one."""
    other = RwkvForCausalLM.from_pretrained(plain, dtype=model.dtype, device_map=DEVICE)
    for name, matrix in matrices(model).items():
        other.get_submodule(name).weight.data = dequantised(matrix).to(model.dtype)
    return other.eval()


def ids(rows, length, seed=0):
    return text(rows, length, seed=seed).to(DEVICE)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("method", METHODS)
def test_only_the_matrices_of_blocks_are_quantised(method, dtype, plain):
    if "packed" in method and dtype != torch.bfloat16:
        pytest.skip("packed for products in bfloat16 only")
    before = RwkvForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model = load(plain, method, dtype)
    found = matrices(model)
    assert {name.partition("blocks.")[2].split(".", 1)[1] for name in found} == MATRICES
    for matrix in found.values():
        assert type(matrix.weight.data) is not torch.Tensor or not matrix.weight.is_floating_point()
    weights = {f"{name}.weight" for name in found}
    for name, x in model.named_parameters():
        if name not in weights:
            expected = before.get_parameter(name).to(DEVICE)
            same(x, expected.to(dtype) if name in ("head.weight", "rwkv.embeddings.weight") else expected)
    with torch.no_grad():
        layers = model(ids(2, 5)).past_key_values.layers
    assert {layer.wkv.dtype for layer in layers} == {torch.float32}
    assert {layer.time_mix.dtype for layer in layers} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("narrow", [[], ["bias"], ["weight"]])
def test_a_norm_of_more_bits_answers_in_those_of_its_input(narrow, dtype):
    """A library may load some of its parameters in fewer bits than others."""
    norm = RwkvLayerNorm(33, dtype=torch.float64, device=DEVICE)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    for name in narrow:
        norm.get_parameter(name).data = norm.get_parameter(name).data.to(dtype)
    x = torch.randn(2, 5, 33, device=DEVICE).to(dtype)
    expected = nn.functional.layer_norm(x.double(), (33,), norm.weight.double(), norm.bias.double(), norm.eps)
    same(norm(x), expected.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("model", EXACT, indirect=True)
def test_logits_are_those_of_the_dequantised_weights(model, plain):
    for length in (1, 2, 37):
        agree(model(ids(3, length)).logits, whole(model, plain)(ids(3, length)).logits, **NARROW[model.dtype])


@torch.no_grad()
@pytest.mark.parametrize("model", [*EXACT, pytest.param("bitsandbytes 8 bits", marks=on_gpu)], indirect=True)
def test_training_and_evaluation_compute_the_same_and_leave_the_weights_alone(model):
    before = sha256(model)
    evaluated = model(ids(2, 37)).logits
    same(model.train()(ids(2, 37)).logits, evaluated)
    same(model.eval()(ids(2, 37)).logits, evaluated)
    assert sha256(model) == before


def test_the_fingerprint_sees_every_bit(model):
    before, matrix = sha256(model), next(iter(matrices(model).values()))
    state = matrix.weight.qdata if hasattr(matrix.weight, "qdata") else matrix.weight.data
    number = state.flatten()[:1].view(torch.uint8)
    number += 1
    assert sha256(model) != before
    number -= 1
    assert sha256(model) == before


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(model, side):
    rows = [ids(1, length)[0].cpu() for length in (1, 13, 29)]
    batch, mask = (x.to(DEVICE) for x in padded(rows, side))
    logits = model(batch, attention_mask=mask).logits
    for row, alone in enumerate(rows):
        agree(logits[row][mask[row] == 1], model(alone[None].to(DEVICE)).logits[0], **NARROW[model.dtype])


@torch.no_grad()
def test_reading_in_parts_equals_reading_at_once(model):
    tokens = ids(2, 31)
    first = model(tokens[:, :11], use_cache=True)
    second = model(tokens[:, 11:12], past_key_values=first.past_key_values)
    third = model(tokens[:, 12:], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, third.logits], 1)
    agree(parts, model(tokens).logits, **NARROW[model.dtype])


def test_generation_with_its_cache_equals_generation_without(model):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(ids(2, 7), use_cache=use_cache, **options) for use_cache in (True, False)]
    if model.dtype == torch.float32:  # in fewer bits, two tokens may be equally likely
        same(*written)
    assert written[0].shape == (2, 19)


@pytest.mark.parametrize("chunk_length", [1, 8, 64])
def test_the_loss_in_chunks_has_the_gradients_of_the_whole(model, chunk_length, request):
    if "int4 packed" in request.node.name:
        pytest.skip("torchao's packed products have no gradients")
    found = []
    for options in ({}, {"chunk_length": chunk_length}):
        embeddings = model.rwkv.embeddings.weight.requires_grad_()
        loss = model(ids(2, 29), labels=ids(2, 29), **options).loss
        loss.backward()
        found.append((loss.detach(), embeddings.grad))
        model.zero_grad(set_to_none=True)
    agree(found[1], found[0], **NARROW[model.dtype])


def test_autocast_computes_in_bfloat16_what_float32_computes(model):
    expected = model(ids(2, 29)).logits
    with torch.autocast(DEVICE, torch.bfloat16):
        found = model(ids(2, 29)).logits
    assert (found.float() - expected.float()).norm() < 0.05 * expected.float().norm()


@torch.no_grad()
def test_it_compiles_as_one_graph(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    agree(compiled(ids(2, 29), use_cache=False).logits, model(ids(2, 29)).logits, **NARROW[model.dtype])


@torch.no_grad()
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_what_is_loaded(method, dtype, plain, tmp_path):
    if "packed" in method and dtype != torch.bfloat16:
        pytest.skip("packed for products in bfloat16 only")
    model = load(plain, method, dtype)
    model.set_initial_state(model(ids(1, 9)).past_key_values)
    logits = model(ids(2, 29)).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DEVICE)
    assert {name: x.dtype for name, x in loaded.named_parameters()} == {
        name: x.dtype for name, x in model.named_parameters()
    }
    same(loaded(ids(2, 29)).logits, logits)


@pytest.fixture(name="saved", scope="module", params=["int8", "int4"])
def saved_model(request, folder, tmp_path_factory):
    """A quantised model of bytes in bfloat16, with its tokenizer."""
    path = tmp_path_factory.mktemp("saved") / "model"
    make({"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}).save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return quantise(path, request.param)


@pytest.mark.parametrize("options", [(), ("--dtype", "float32")])
def test_the_command_writes_with_a_quantised_model(saved, options):
    result = write_on(saved, "--device", "cpu", "--temperature", 0, *options)
    assert len(result.stderr.splitlines()) == 1 and "tokens/s" in result.stderr
    tokenizer = AutoTokenizer.from_pretrained(saved)
    generate = pipeline("text-generation", model=str(saved), tokenizer=tokenizer, device="cpu")
    assert generate.model.dtype == torch.bfloat16
    written = generate("Once", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert result.stdout.rstrip("\n") == written.rstrip("\n")


def test_a_missing_library_is_named(saved, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    refused(rwkv("generate", "Once", "--model", saved), "torchao", "pip install modeling-rwkv[quantize]")


def test_what_a_library_cannot_multiply_is_told_in_a_sentence(saved, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", raiser(RuntimeError("shape '[20, 3]' is invalid\nfor input")))
    result = rwkv("generate", "Once", "--model", saved)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "[20, 3]" in line and "--device" in line


def test_libraries_make_no_remarks_on_the_standard_error_of_commands():
    words = [sys.executable, "-m", "modeling_rwkv.cli", "generate", "Once", "--device", "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")


def test_the_command_evaluates_a_quantised_model(saved, tmp_path):
    result = rwkv("eval", saved, "--quick", "--tasks", "lambada_openai", "--limit", 2, "--output", tmp_path)
    assert result.exit_code == 0, result.stderr
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["rwkv"]["dtype"] == "bfloat16"
