"""Laws of the loss in chunks: it is the loss, with its gradients, in less memory."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from models import agree, gradients, make, padded, same, text
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear
from transformers import DataCollatorWithFlattening

from modeling_rwkv import loss as loss_module

LOSS = {"rtol": 1e-6, "atol": 0}
GRADIENTS = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


@pytest.fixture(autouse=True, params=[1, 1024])
def fewest_positions(request, monkeypatch):
    """So few that chunks are as small as can be, C positions; and as it is."""
    monkeypatch.setattr(loss_module, "FEWEST_POSITIONS", request.param)
    return request.param


def run(model, **batch):
    """The loss and the gradients, in double precision and relative to the largest of each parameter."""
    output = model(**batch)
    output.loss.backward()
    grads = {name: grad.double() for name, grad in gradients(model).items()}
    return output.loss.detach(), grads


def relative(grads, to):
    """Those of a parameter a thousandth as large as others' may be all rounding: they are relative to that."""
    largest = {name: grad.abs().max() for name, grad in to.items()}
    least = 1e-3 * max(largest.values())
    return {name: grads[name] / size.clamp(min=least) for name, size in largest.items()}


def is_the_loss(model, **batch):
    """Both ways: equal losses, equal gradients, no logits."""
    model.train()
    dtype = next(model.parameters()).dtype
    expected, expected_grads = run(model, **batch)
    assert model(**batch, skip_logits=True).logits is None
    loss, grads = run(model, **batch, skip_logits=True)
    agree(loss, expected, **LOSS)
    agree(relative(grads, expected_grads), relative(expected_grads, expected_grads), **GRADIENTS[dtype])


def rows(*lengths, side="right"):
    ids, mask = padded([text(1, n, seed=n)[0] for n in lengths], side)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(*lengths):
    ids = torch.cat([text(1, n, seed=n) for n in lengths], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def prompted(rows, length):
    """The loss is on the last third of each text."""
    ids = text(rows, length)
    labels = ids.clone()
    labels[:, : 2 * length // 3] = -100
    return {"input_ids": ids, "labels": labels}


def flattened(*lengths, **options):
    rows = [{"input_ids": text(1, n, seed=n)[0].tolist()} for n in lengths]
    return dict(DataCollatorWithFlattening(**options)(rows))


BATCHES = {
    "dense": {"input_ids": text(2, 21), "labels": text(2, 21)},
    "one token counts": {"input_ids": text(1, 2), "labels": text(1, 2)},
    "left padded": rows(5, 1, 19, side="left"),
    "right padded": rows(5, 1, 19),
    "packed": packed(3, 1, 17, 8),
    "flattened": flattened(3, 1, 17, 8, return_flash_attn_kwargs=True, return_seq_idx=True),
    "flattened, with lengths": flattened(3, 1, 17, 8, return_flash_attn_kwargs=True, return_position_ids=False),
    "flattened, with numbers": flattened(3, 1, 17, 8, return_seq_idx=True, return_position_ids=False),
    "prompts": prompted(3, 15),
    "shifted": {"input_ids": text(2, 9), "labels": text(2, 9), "shift_labels": text(2, 9, seed=1)},
    "divided": {"input_ids": text(2, 9), "labels": text(2, 9), "num_items_in_batch": torch.tensor(5)},
}


@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_the_loss(batch, dtype):
    is_the_loss(make(dtype=dtype), **BATCHES[batch])


@pytest.mark.parametrize("shape", ["one layer", "wide attention", "narrow attention", "one channel"])
def test_it_is_the_loss_of_models_of_odd_shapes(shape):
    model = make(shape, dtype=torch.float64)
    ids = text(2, 13, model.config.vocab_size)
    is_the_loss(model, input_ids=ids, labels=ids)


def test_packed_padded_and_separate_rows_have_one_loss():
    model = make()
    lengths = (3, 9, 17)
    items = sum(lengths) - len(lengths)
    separate = [text(1, n, seed=n) for n in lengths]
    alone = sum(model(ids, labels=ids, num_items_in_batch=items).loss for ids in separate)
    together = [packed(*lengths), flattened(*lengths), rows(*lengths), rows(*lengths, side="left")]
    for batch in together:
        agree(model(**batch, skip_logits=True).loss, alone)


@pytest.mark.parametrize("items", [None, 3, torch.tensor(3)])
def test_without_a_token_that_counts_it_is_what_the_loss_is(items):
    model = make().train()
    batch = {"input_ids": text(2, 5), "labels": torch.full((2, 5), -100), "num_items_in_batch": items}
    expected, chunked = model(**batch).loss, model(**batch, skip_logits=True).loss
    torch.testing.assert_close(chunked, expected, rtol=0, atol=0, equal_nan=True)
    chunked.backward()  # other processes wait for the gradients of this one
    grads = gradients(model)
    if items is not None:
        assert not any(grad.any() for grad in grads.values())


def test_it_is_the_loss_through_adapters_checkpoints_and_ties():
    adapters = LoraConfig(r=3, target_modules=["key", "head"], init_lora_weights=False)
    adapted = get_peft_model(make(), adapters)
    ids = text(2, 19)
    is_the_loss(adapted, input_ids=ids, labels=ids)
    checkpointed = make()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    is_the_loss(checkpointed, input_ids=ids, labels=ids)
    is_the_loss(make(tie_word_embeddings=True), input_ids=ids, labels=ids)


class Int8(nn.Module):
    """A head that has no matrix of its own dtype, as quantisation leaves it."""

    def __init__(self, head):
        super().__init__()
        self.scale = head.weight.detach().abs().amax(1, keepdim=True) / 127
        self.codes = (head.weight.detach() / self.scale).round().to(torch.int8)

    def forward(self, x):
        return linear(x, self.codes * self.scale)


def test_it_is_the_loss_through_any_head():
    model = make()
    model.head = Int8(model.head)
    is_the_loss(model, input_ids=text(2, 19), labels=text(2, 19))


def test_dropout_is_the_same_in_both_passes():
    """The head is computed twice; a gradient along the loss must lower it."""
    model = make(dtype=torch.float64).train()
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)
    ids = text(2, 19)

    def loss():
        torch.manual_seed(0)
        return model(ids, labels=ids, skip_logits=True).loss

    weight = model.head[1].weight
    (grad,) = torch.autograd.grad(loss(), weight)
    step = 1e-2
    with torch.no_grad():
        weight += step * grad
        up = loss()
        weight -= 2 * step * grad
        down = loss()
    agree((up - down) / (2 * step), grad.square().sum().float(), rtol=1e-2)


@pytest.mark.parametrize(("autocast", "times"), [(False, 2), (True, 1.05)])
def test_low_precision_errs_hardly_more(autocast, times):
    """Under autocast, whose weights are float32, no more; bfloat16 weights have gradients summed in bfloat16."""
    exact = make()
    ids = text(4, 40)
    expected = run(exact.train(), input_ids=ids, labels=ids)
    model = make(dtype=torch.float32 if autocast else torch.bfloat16).train()
    errors = []
    for options in ({}, {"skip_logits": True}):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, grads = run(model, input_ids=ids, labels=ids, **options)
        errors.append({name: (grad - expected[1][name]).norm().item() for name, grad in grads.items()})
        errors[-1]["loss"] = (loss - expected[0]).abs().item()
    assert all(error <= times * errors[0][name] + 1e-6 for name, error in errors[1].items()), errors


@pytest.mark.parametrize("batch", ["dense", "prompts"])
def test_it_compiles_as_one_graph(batch):
    model, compiled = make().train(), torch.compile(make().train(), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    loss, grads = run(model, **BATCHES[batch], skip_logits=True)
    compiled_loss, compiled_grads = run(compiled, **BATCHES[batch], skip_logits=True)
    agree(compiled_loss, loss, **LOSS)
    grads = {f"_orig_mod.{name}": grad for name, grad in grads.items()}
    agree(relative(compiled_grads, grads), relative(grads, grads), rtol=1e-4, atol=1e-4)


class Watched(nn.Module):
    """A head that remembers for how many positions it was asked."""

    def __init__(self, head):
        super().__init__()
        self.head, self.positions = head, []

    def forward(self, x):
        self.positions.append(x[..., 0].numel())
        return self.head(x)


def test_only_what_counts_is_computed_a_chunk_at_a_time(fewest_positions):
    model = make().train()
    model.head = Watched(model.head)
    batch = prompted(30, 30)
    model(**batch, skip_logits=True).loss.backward()
    n = max(fewest_positions, 24)  # 24 channels
    full, rest = divmod(30 * 10, n)
    assert model.head.positions[: len(model.head.positions) // 2] == [n] * full + [rest] * (rest > 0)
    assert sum(model.head.positions) == 2 * 30 * 10


def test_evaluation_computes_the_head_once():
    model = make()
    model.head = Watched(model.head)
    ids = text(2, 9)
    with torch.no_grad():
        same(model(ids, labels=ids, skip_logits=True).loss, model(ids, labels=ids, skip_logits=True).loss)
    assert sum(model.head.positions) == 2 * 2 * 8


def test_what_cannot_be_computed_is_refused():
    model = make()
    ids = text(2, 9)
    with pytest.raises(ValueError, match="labels"):
        model(ids, skip_logits=True)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, skip_logits=True, logits_to_keep=3)


# The benchmark


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The program, to be run in this process: `benchmark(options)` gives its exit code and report."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    for name in ("measure", "sides", "model", "loss"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    program = importlib.import_module("loss")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def run(*options):
        report = tmp_path / "report.json"
        argv = [str(folder / "loss.py"), "--shape", "tiny", "--device", "cpu", "--repeats", "1", "--json", str(report)]
        monkeypatch.setattr(sys, "argv", [*argv, "--plot", str(tmp_path / "plot.png"), *options])
        return program.main(), json.loads(report.read_text())

    return run


def test_the_benchmark_measures_every_way(benchmark, fewest_positions, tmp_path):
    code, report = benchmark("--tokens", "96")
    assert code == 0 and report["agree"]
    found = report["tokens"]["96"]
    assert found["peak_bytes"].keys() == found["seconds"].keys() == {"whole", "in chunks", "read in chunks"}
    assert all(of["min"] > 0 for of in found["seconds"].values())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_measures_nothing_that_differs(benchmark, tmp_path, capsys):
    code, report = benchmark("--tokens", "96", "--tolerance=-1")
    assert code == 1 and not report["agree"] and "tokens" not in report
    assert "seconds" not in capsys.readouterr().out and not (tmp_path / "plot.png").exists()
