"""Laws about the benchmark of speed in generation: what it times, and what it refuses to. No law about speed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("measure", "sides", "generate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return importlib.import_module("generate")


@pytest.fixture
def run(program, monkeypatch, tmp_path, capsys):
    """The program in this process: its exit code, its report and what it printed."""

    def run(*options: str) -> tuple[int, dict, str]:
        files = "--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plot.png")
        words = "--shape", "tiny", "--prompts", "3", "--repeats", "3", "--reads", "2", *options
        monkeypatch.setattr(sys, "argv", ["generate.py", *files, *words])
        return program.main(), json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return run


def test_every_side_is_timed_in_every_work(run, program, tmp_path):
    code, report, out = run("--tokens", "4", "9", "--batches", "1", "2")
    assert code == 0 and not report["disagree"]
    assert len(report["work"]) == 2 * 2 * 2
    for label, work in report["work"].items():
        alone = {program.AT_ONCE, *(program.ONE_ROW if work["batch"] > 1 else ())}
        assert list(work["sides"]) == [name for name in program.WRITERS if name not in alone]
        assert len(work["reading_seconds"]) == 3 * 2 and 0 < work["in_kernel"] < 1
        assert label in out
        for side in work["sides"].values():
            assert 0 < side["slowest"] <= side["tokens_per_second"] <= side["fastest"]
            assert side["share_of_ceiling"] == side["tokens_per_second"] / work["ceiling"]
            assert len(side["speed_by_position"]) == work["tokens"] - 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_ceiling_counts_every_weight_but_the_embeddings(run):
    _, report, _ = run("--tokens", "4", "--sides", "ours")
    channels, vocabulary, layers = 64, 503, 2
    block = 13 * channels**2 + (2 + 3 + 2 + 4) * channels  # 4 matrices and one 4 wide twice and one more; vectors
    weights = layers * block + channels * vocabulary + 4 * channels
    assert report["weight_bytes"] == {"float32": 4 * weights, "bfloat16": 2 * weights}


def test_reading_adds_up_everything(program):
    from rwkv_kernels.loader import cpu_library

    x = torch.arange(64 * 1000, dtype=torch.int32) % 1000
    assert program.read_weights(x) > 0
    for threads in (1, 3):
        assert cpu_library(FOLDER / "read_memory.cpp").read_memory(x.data_ptr(), x.numel(), threads) == int(x.sum())


def test_sides_that_write_other_tokens_are_not_timed_against_each_other(run, program, monkeypatch):
    write = program.write

    def wrong(name, model, ids, tokens):
        clock = write(name, model, ids, tokens)
        clock.ids[-1] = clock.ids[-1] + (name == "built-in")
        return clock

    monkeypatch.setattr(program, "write", wrong)
    code, report, out = run("--tokens", "4", "--dtypes", "float32")
    assert code == 1 and len(report["disagree"]) == 1 and "built-in" in report["disagree"][0]
    assert "tokens/s" not in out


def test_official_writes_what_generate_writes(program):
    ids = torch.tensor([[3, 1, 4]])
    tokens = [
        torch.stack(program.write(name, program.load(name, "tiny", 0, "float32"), ids, 12).ids[1:]).flatten().tolist()
        for name in ("ours", "official")
    ]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 12


def test_settings_of_the_model_are_what_tells_ours_from_ours(program):
    model = program.load("ours", "tiny", 0, "float32")
    found = []
    generate = model.generate
    model.generate = lambda *args, **kwargs: (
        found.append((model.native_decoding, model.prefill_tokens)) or generate(*args, **kwargs)
    )
    for name in (program.OURS, program.MODULES, program.AT_ONCE, program.OURS):
        program.write(name, model, torch.tensor([[3]]), 3)
    assert found == [(True, 4096), (False, 4096), (True, None), (True, 4096)]


def test_an_interrupted_run_goes_on(run, program, monkeypatch):
    measured = []
    summary = program.summary

    def heard(work, *rest):
        measured.append(str(work))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return summary(work, *rest)

    monkeypatch.setattr(program, "summary", heard)
    words = "--tokens", "4", "5", "--sides", "ours", "official", "--starts", "1", "3"
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    code, report, out = run(*words, "--resume")
    assert code == 0 and len(measured) == 5 and measured[2] == measured[3]
    assert list(report["work"]) == [*measured[:2], *measured[3:]] and len(report["starts"]) == 2
    assert all(label in out for label in report["work"])
    _, again, _ = run(*words, "--resume", "--batches", "2")
    assert report["work"].items() <= again["work"].items() and len(measured) == 9
    monkeypatch.setattr(program, "measure", None)
    assert run(*words, "--resume", "--seed", "1")[0] == 2
    monkeypatch.setattr(program, "environment", lambda _: again["environment"] | {"cpu": "another"})
    assert run(*words, "--resume")[0] == 2


@pytest.mark.parametrize("options", [("--sides", "official"), ("--tokens", "2"), ("--batches", "0")])
def test_bad_options_are_refused(run, options):
    with pytest.raises(SystemExit) as refusal:
        run(*options)
    assert refusal.value.code == 2
