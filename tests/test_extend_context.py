"""Laws of context extension: one length after the other, and what a longer context is worth."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning import WORDS, own_cache, save_rows, tiny_model  # noqa: F401 - fixtures
from models import make, same
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rwkv_finetune import context, extend_context
from rwkv_finetune.packing import TokenStream


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(WORDS.split(), k=rng.choice((5, 40, 150))))} for _ in range(30)]
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


def command_line(base: Path, data: Path, output_dir: Path, **options) -> list[str]:
    settings = {
        "model": base,
        "train_file": data,
        "output_dir": output_dir,
        "validation_share": 0.2,
        "max_steps": 2,
        "learning_rate": 0.01,
        "save_dtype": "float32",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    words = [f"--{key}={value}" for key, value in (settings | options).items()]
    return [*words, "--context_lengths", "32", "64"]


def run(base: Path, data: Path, output_dir: Path, **options) -> Path:
    extend_context.main(command_line(base, data, output_dir, **options))
    return output_dir


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory) -> Path:
    return run(base, data, tmp_path_factory.mktemp("finished") / "run")


def parameters(folder: Path) -> list[torch.Tensor]:
    return list(AutoModelForCausalLM.from_pretrained(folder).parameters())


def test_every_length_has_a_model_that_the_next_one_starts_from(base, finished):
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (base, finished / "32/model", finished / "64/model")]
    assert [model.config.context_length for model in models[1:]] == [32, 64]
    for one, two in itertools.pairwise(models):
        assert any((x - y).abs().max() > 1e-3 for x, y in zip(one.parameters(), two.parameters(), strict=True))
    states = [json.loads((finished / f"{n}/trainer_state.json").read_text()) for n in (32, 64)]
    assert [state["global_step"] for state in states] == [2, 2]
    assert states[0]["train_batch_size"] == 2 * states[1]["train_batch_size"]
    measured = json.loads((finished / "context.json").read_text())
    assert list(measured) == ["as it was", "32 tokens", "64 tokens"]
    for loss in measured.values():
        assert list(loss["by_length"]) == ["32", "64"]
        assert list(loss["by_position"]) == ["1", "3", "7", "15", "31", "63"]
    assert measured["64 tokens"]["by_length"]["64"] < 0.9 * measured["as it was"]["by_length"]["64"]
    assert (finished / "context.png").stat().st_size > 0


def test_chunks_learn_the_same(base, data, finished, tmp_path):
    chunked = run(base, data, tmp_path / "run", chunk_length=10)
    for one, other in zip(parameters(chunked / "64/model"), parameters(finished / "64/model"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    cut = run(base, data, tmp_path / "cut", chunk_length=10, carry_gradients="false")
    pairs = zip(parameters(cut / "64/model"), parameters(finished / "64/model"), strict=True)
    assert any((one - other).abs().max() > 1e-3 for one, other in pairs)


def test_a_run_that_was_stopped_goes_on_at_the_length_it_was_at(base, data, finished, tmp_path):
    class Stop(Exception):
        pass

    def stop(course, base, length):
        if length == 64:
            raise Stop
        return original(course, base, length)

    with pytest.MonkeyPatch.context() as patch:
        original = extend_context.Course.train
        patch.setattr(extend_context.Course, "train", stop)
        with pytest.raises(Stop):
            run(base, data, tmp_path / "run")
    written = (tmp_path / "run/32/model/model.safetensors").stat().st_mtime_ns
    measured = []
    with pytest.MonkeyPatch.context() as patch:
        measure = extend_context.measure
        patch.setattr(extend_context, "measure", lambda *args: measured.append(args[-1]) or measure(*args))
        run(base, data, tmp_path / "run")
    assert measured == ["64 tokens"]
    assert (tmp_path / "run/32/model/model.safetensors").stat().st_mtime_ns == written
    for one, other in zip(parameters(tmp_path / "run/64/model"), parameters(finished / "64/model"), strict=True):
        same(one, other)
    assert (tmp_path / "run/context.json").read_text() == (finished / "context.json").read_text()


def test_two_processes_go_from_one_length_to_the_next(base, data, finished, tmp_path):
    """Both start from what one of them has written."""
    words = command_line(base, data, tmp_path / "run", chunk_length=10, per_device_train_batch_size=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    program = [*launcher, "-m", "rwkv_finetune.extend_context", *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run(base, data, tmp_path / "alone", chunk_length=10, per_device_train_batch_size=2)
    for one, other in zip(parameters(tmp_path / "run/64/model"), parameters(alone / "64/model"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert list(context.load_losses(tmp_path / "run")) == ["as it was", "32 tokens", "64 tokens"]


def test_what_is_measured_is_what_is_saved(base, data, tmp_path):
    folder = run(base, data, tmp_path / "run", save_dtype="bfloat16", max_steps=1)
    assert {x.dtype for x in load_file(folder / "64/model/model.safetensors").values()} == {torch.bfloat16}
    state = json.loads((folder / "64/trainer_state.json").read_text())
    measured = context.load_losses(folder)["64 tokens"].by_length[64]
    assert state["log_history"][-1]["eval_loss"] == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_losses_are_those_of_each_token_after_what_is_read_with_it(joined, chunk, monkeypatch):
    monkeypatch.setattr(context, "CHUNK", chunk)
    model = make({"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2})
    generator = np.random.default_rng(0)
    lengths = [40] if joined else [3, 17, 1, 20]
    tokens = generator.integers(1, 50, sum(lengths)).astype(np.int32)
    stream = TokenStream(tokens, np.cumsum([0, *lengths]))
    measured = context.measure(model, stream, [16, 8], 0, "test")
    by_position: dict[int, list[float]] = {}
    for window in (8, 16):
        by_position, document = {}, 0
        for length in lengths:
            for begin in range(0, length - 1, window - 1):  # pieces share a token, so that each is predicted once
                piece = torch.tensor(tokens[document + begin : document + min(begin + window, length)])[None].long()
                nats = -model(piece).logits[0, :-1].log_softmax(-1).gather(1, piece[0, 1:, None])[:, 0]
                for position, value in enumerate(nats.tolist(), 1):
                    by_position.setdefault(position, []).append(value)
            document += length
        values = [value for found in by_position.values() for value in found]
        assert measured.by_length[window] == pytest.approx(sum(values) / len(values), rel=1e-4)
    for end, loss in measured.by_position.items():
        values = [v for position in range(2 ** int(math.log2(end)), end + 1) for v in by_position[position]]
        assert loss == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert list(measured.by_position) == [1, 3, 7, 15]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"context_lengths": "8 4"}, "they must be 2 or more, rise"),
        ({"context_lengths": "1"}, "they must be 2 or more, rise"),
        ({"context_lengths": "8 12"}, "and divide the last one"),
        ({"context_lengths": "9999"}, "no document of train_file has 9,999 tokens"),
        ({"context_length": "8"}, "it is context_lengths that counts"),
        ({"chunk_length": "0"}, "chunk_length is 0; it must be at least 1"),
        ({"chunk_length": "8", "logit_penalty": "1e-4"}, "logit_penalty needs all logits"),
        ({"chunk_length": "8", "label_smoothing_factor": "0.1"}, "label_smoothing_factor needs all logits"),
        ({"streaming": "true", "max_steps": "1"}, "streaming and unpacked rows are not possible"),
        ({"packing": "false"}, "streaming and unpacked rows are not possible"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(base, data, tmp_path, capsys, options, complaint):
    words = [f"--model={base}", f"--train_file={data}", f"--output_dir={tmp_path / 'run'}", "--report_to=none"]
    for name, value in options.items():
        words += [f"--{name}", *value.split()]
    with pytest.raises(SystemExit) as stop:
        extend_context.main(words)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and complaint in line
    assert not (tmp_path / "run").exists()
