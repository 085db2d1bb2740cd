"""Laws of test loss against context length: the same tokens at every length, of long documents alone."""

import json
import math

import pytest
import torch
from models import make

from rwkv_eval import context_length
from rwkv_eval.context_length import by_length
from rwkv_finetune.tokenizer import train_tokenizer

DOCUMENTS = ["The cat sat on the mat. " * 9, "a", "Ein Kätzchen saß da. 🐈 " * 7, "one two three"]
LONG = [DOCUMENTS[0], DOCUMENTS[2]]  # the only ones of more than 20 tokens


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


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    return path


@torch.no_grad()
def nats_in_windows(model, ids: list[int], length: int) -> float:
    """Of a document, its first token given, from one plain forward pass for each window."""
    total = 0.0
    for first in range(1, len(ids), length):
        end = min(first + length, len(ids))
        window = torch.tensor(ids[max(0, end - 1 - length) : end])
        predicted = model(window[None, :-1]).logits[0].double().log_softmax(-1)
        total -= float(predicted.gather(-1, window[1:, None])[first - end :].sum())
    return total


@pytest.mark.parametrize("lengths", [[1], [3, 7], [20, 5, 20]])
def test_every_length_reads_the_long_documents_in_its_windows(model, tokenizer, lengths):
    found = by_length(model, tokenizer, DOCUMENTS, lengths)
    assert list(found) == sorted(set(lengths))
    # At a length of 1 "one two three" is long enough, too.
    documents = [text for text in DOCUMENTS if len(tokenizer(text)["input_ids"]) > max(lengths)]
    encoded = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in documents]
    for length, measure in found.items():
        assert measure.tokens == sum(len(ids) - 1 for ids in encoded)
        expected = sum(nats_in_windows(model, ids, length) for ids in encoded)
        assert measure.nats == pytest.approx(expected, rel=1e-4)


def test_short_documents_change_nothing(model, tokenizer):
    assert by_length(model, tokenizer, DOCUMENTS, [4, 20]) == by_length(model, tokenizer, LONG, [4, 20])


def test_what_cannot_be_measured_is_refused(model, tokenizer):
    longest = max(len(tokenizer(text)["input_ids"]) for text in DOCUMENTS)
    with pytest.raises(ValueError, match=f"the longest has {longest}"):
        by_length(model, tokenizer, DOCUMENTS, [4, longest])
    with pytest.raises(ValueError, match="at least 1"):
        by_length(model, tokenizer, DOCUMENTS, [4, 0])


def test_the_command_writes_what_it_prints(folder, file, tmp_path, capsys):
    words = ["--file", str(file), "--model", str(folder), "--lengths", "4", "20", "--output", str(tmp_path), "--json"]
    context_length.main(words)
    written = json.loads((tmp_path / "context_length.json").read_text())
    assert written == json.loads(capsys.readouterr().out)
    found = written["models"][str(folder)]
    assert list(found["loss"]) == ["4", "20"] and written["file"] == "text.txt"
    size = sum(len(text.encode()) for text in LONG)
    for length, loss in found["loss"].items():
        assert found["bits_per_byte"][length] == pytest.approx(loss * found["tokens"] / math.log(2) / size)
    assert (tmp_path / "context_length.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--file", "missing.txt"], "missing.txt"),
        (["--lengths", "100000"], "100,000"),
        (["--lengths", "0"], "at least 1"),
        (["--chunk", "0"], "chunk"),
    ],
)
def test_bad_input_is_one_sentence(folder, file, capsys, options, said):
    words = ["--file", str(file), "--model", str(folder), "--lengths", "4", *options]
    with pytest.raises(SystemExit) as stop:
        context_length.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
