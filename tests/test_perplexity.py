"""Laws of measuring text: what is counted is counted once, whatever it is cut into, and windows are the harness's."""

import json
import math
import os
import sys
from pathlib import Path

import evaluate
import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from models import make, text

from modeling_rwkv import RwkvConfig, RwkvForCausalLM
from rwkv_eval import perplexity
from rwkv_eval.harness import RwkvLM
from rwkv_eval.losses import PositionLosses, token_losses
from rwkv_eval.perplexity import measure, pieces
from rwkv_finetune.tokenizer import train_tokenizer

DOCUMENTS = ["The cat sat on the mat.", "Ein Kätzchen saß da. 🐈", "a", "one two three four five six seven " * 9]
BYTES = sum(len(document.encode()) for document in DOCUMENTS)
MODULE = Path(perplexity.__file__).parent / "rwkv_perplexity"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make(vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    """-log p of ids[1:], from one plain forward pass over ids[:-1]."""
    with torch.no_grad():
        predicted = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
    return -predicted.gather(-1, ids[1:, None])[:, 0]


# Tokens


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 4], [9, 1, 30, 2]])
def test_each_sequence_is_read_by_itself_and_whole(chunk, lengths):
    model = make("wide attention")
    rows = [text(1, length, 53, seed=i)[0] for i, length in enumerate(lengths)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    losses = token_losses(model, torch.cat(rows), ends, chunk)
    expected = torch.cat(
        [torch.cat([torch.zeros(1), alone(model, row)]) if len(row) > 1 else torch.zeros(1) for row in rows]
    )
    torch.testing.assert_close(losses.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_an_initial_state_is_part_of_the_model():
    model, ids = make(), text(1, 20)[0]
    with torch.no_grad():
        model.set_initial_state(model(text(1, 7, seed=3), use_cache=True).past_key_values)
    losses = token_losses(model, ids, torch.tensor([0, 20]), chunk=6)
    torch.testing.assert_close(losses[1:].double(), alone(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 1000])
def test_bins_end_before_powers_of_two_and_hold_everything(count):
    losses, positions = PositionLosses(), torch.randperm(count) + 1
    for part in positions.split(3):
        losses.add(part, part.float())
    assert (losses.tokens, losses.nats) == (count, count * (count + 1) / 2)
    begin, means = 1, losses.means()
    for end, mean in means.items():
        assert end == count or end + 1 == 2 * begin
        assert mean == pytest.approx((begin + end) / 2)
        begin = end + 1
    assert begin == count + 1


# Texts


def test_a_model_that_knows_nothing_costs_the_logarithm_of_its_vocabulary(tokenizer):
    uniform = RwkvForCausalLM(RwkvConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)).eval()
    uniform.head.weight.data.zero_()
    result = measure(uniform, tokenizer, DOCUMENTS)
    tokens = sum(len(tokenizer(document)["input_ids"]) for document in DOCUMENTS)
    assert (result.tokens, result.bytes) == (tokens, BYTES)
    assert result.bits_per_byte == pytest.approx(tokens * math.log2(len(tokenizer)) / BYTES, rel=1e-6)
    assert result.perplexity == pytest.approx(len(tokenizer), rel=1e-6)
    assert all(loss == pytest.approx(math.log(len(tokenizer)), rel=1e-6) for loss in result.by_position.values())


@pytest.mark.parametrize("chunk", [1, 2, 7, 40])
def test_chunks_change_nothing(model, tokenizer, chunk):
    whole, parts = (measure(model, tokenizer, DOCUMENTS, chunk=size) for size in (10_000, chunk))
    assert parts.nats == pytest.approx(whole.nats, rel=1e-5)
    assert (parts.tokens, parts.bytes) == (whole.tokens, whole.bytes)
    assert parts.by_position == pytest.approx(whole.by_position, rel=1e-4)


def test_it_is_the_probability_of_the_text_after_one_end_of_text(model, tokenizer):
    ids = torch.tensor([0, *tokenizer(DOCUMENTS[0])["input_ids"]])
    assert measure(model, tokenizer, DOCUMENTS[:1]).nats == pytest.approx(float(alone(model, ids).sum()), rel=1e-5)


def test_documents_do_not_see_each_other(model, tokenizer):
    together = measure(model, tokenizer, DOCUMENTS).nats
    assert together == pytest.approx(sum(measure(model, tokenizer, [text]).nats for text in DOCUMENTS), rel=1e-6)


# Windows


@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 8, 20, 21])
@pytest.mark.parametrize("window", [1, 2, 7, 50])
def test_windows_are_those_of_the_harness(tokens, window):
    ids = list(range(1, tokens + 1))
    cut = [(piece.tokens, list(piece.scored)) for piece in pieces([0, *ids], window)]
    theirs = get_rolling_token_windows(ids, prefix_token=0, max_seq_len=window, context_len=1)
    expected = [(context + predicted, predicted) for context, predicted in map(make_disjoint_window, theirs)]
    assert cut == expected


def test_a_window_as_long_as_the_text_changes_nothing_and_a_short_one_forgets(model, tokenizer):
    whole, same, short = (measure(model, tokenizer, DOCUMENTS, window) for window in (None, 10_000, 2))
    assert same == whole
    assert (short.tokens, short.bytes) == (whole.tokens, whole.bytes) and abs(short.nats - whole.nats) > 0.1


# What is refused, written and shared


@pytest.mark.parametrize("option", ["window", "chunk"])
def test_a_part_of_nothing_is_refused(model, tokenizer, option):
    with pytest.raises(ValueError, match=option):
        measure(model, tokenizer, DOCUMENTS, **{option: 0})


def test_no_text_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="nothing to measure"):
        measure(model, tokenizer, [""])


def test_the_program_writes_what_it_measures(model, tokenizer, folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    options = ["--model", str(folder), "--file", str(tmp_path / "text.txt"), "--window", "3"]
    capsys.readouterr()
    perplexity.main([*options, "--output", str(tmp_path / "out"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["documents"] == len(DOCUMENTS)
    for name, window in (("carried", None), ("windowed", 3)):
        expected = measure(model, tokenizer, DOCUMENTS, window)
        assert printed[name]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text()) == printed
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert len(os.listdir(tmp_path / "out")) == 2


@pytest.mark.parametrize(("model_name", "file"), [("nowhere", "text.txt"), ("nowhere", "missing.txt")])
def test_the_program_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, model_name, file):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    with pytest.raises(SystemExit) as stop:
        perplexity.main(["--model", model_name, "--file", file])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_it_is_a_measurement_of_evaluate(model, tokenizer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which it adds that
    measurement = evaluate.load(str(MODULE), cache_dir=str(tmp_path))
    found = measurement.compute(predictions=DOCUMENTS, model_id=str(folder), window=7, device="cpu")
    assert found == measure(model, tokenizer, DOCUMENTS, window=7).to_dict()


@pytest.mark.parametrize("window", [None, 7])
def test_it_is_a_task_of_the_harness(model, tokenizer, tmp_path, window):
    file = tmp_path / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    manager = TaskManager(include_path=MODULE.parent / "tasks", include_defaults=False, metadata={"file": str(file)})
    reader = (
        RwkvLM(model, tokenizer=tokenizer) if window is None else HFLM(model, tokenizer=tokenizer, max_length=window)
    )
    found = lm_eval.simple_evaluate(reader, tasks=["rwkv_perplexity"], task_manager=manager, bootstrap_iters=0)
    bits = found["results"]["rwkv_perplexity"]["bits_per_byte,none"]
    assert bits == pytest.approx(measure(model, tokenizer, DOCUMENTS, window).bits_per_byte, rel=1e-5)
