"""Laws about the benchmark of speed in generation on a GPU, run on a CPU. No law about speed."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("measure", "sides", "generate_gpu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("generate_gpu")


@pytest.fixture
def run(program, monkeypatch, tmp_path, capsys):
    """The program in this process: its exit code, its report and what it printed."""

    def run(*options: str) -> tuple[int, dict, str]:
        files = "--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plot.png")
        words = "--device", "cpu", "--shape", "tiny", "--tokens", "3", "--repeats", "2", *options
        monkeypatch.setattr(sys, "argv", ["generate_gpu.py", *files, *words])
        return program.main(), json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return run


def test_every_way_is_timed_for_every_batch(run, program, tmp_path):
    code, report, out = run("--batches", "1", "3")
    assert code == 0 and not report["disagree"] and (tmp_path / "plot.png").exists()
    for batch, ways in (("1", program.WAYS), ("3", [way for way in program.WAYS if way != program.BUILT_IN])):
        assert list(report["batches"][batch]["token_seconds"]) == list(ways)
        assert all(len(times) == 2 for times in report["batches"][batch]["token_seconds"].values())
    assert all(f" {way} " in out for way in program.WAYS)


def test_the_peak_is_that_of_the_first_writing(run, program, monkeypatch):
    """Later ones find a graph, and its memory, there."""
    write, peak, written, first = program.write, program.peak, [], []

    def spied_write(way, model, ids, tokens):
        written.append((way, model, len(ids)))
        return write(way, model, ids, tokens)

    def spied_peak(way, model, ids, tokens):
        first.append((way, model, len(ids)) not in written)
        return peak(way, model, ids, tokens)

    monkeypatch.setattr(program, "write", spied_write)
    monkeypatch.setattr(program, "peak", spied_peak)
    run("--batches", "3", "5", "--ways", "ours", "ours, static")
    assert first == [True] * 4


def test_no_speed_is_shown_where_texts_differ(run, program, monkeypatch, tmp_path):
    write = program.write
    wrong = lambda way, *rest: write(way, *rest) + (way == program.STATIC)  # noqa: E731
    monkeypatch.setattr(program, "write", wrong)
    code, report, out = run("--batches", "2")
    assert code == 1 and report["disagree"] == [f"2 rows: {program.STATIC}"] and not report["batches"]
    assert "tokens/s" not in out and not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--ways", "built-in"], "is what the others"), (["--batches", "0"], "at least 1"), (["--device", "tpu"], "tpu")],
)
def test_wrong_options_are_refused(run, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*options)
    assert message in capsys.readouterr().err
