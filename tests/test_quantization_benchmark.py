"""Laws about the benchmark of quantization: what it counts, and what it refuses to. No law about speed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchao")

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
LAYERS, CHANNELS, VOCABULARY = 2, 64, 503


@pytest.fixture
def quantization(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("measure", "sides", "quantization"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return importlib.import_module("quantization")


@pytest.fixture
def run(quantization, monkeypatch, tmp_path, capsys):
    """The program in this process, but for the peaks: its exit code, its report and what it printed."""
    (tmp_path / "text").write_text("The cat sat on the mat.<|endoftext|>The dog ran.")
    monkeypatch.setattr(quantization, "alone", lambda *options: "12345678")

    def run(*rows: str) -> tuple[int, dict, str]:
        words = ["quantization.py", "--shape", "tiny", "--tokens", "2", "--repeats", "1", "--rows", *rows]
        words += ["--file", tmp_path / "text", "--json", tmp_path / "report.json", "--plot", tmp_path / "plot.png"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        return quantization.main(), json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return run


def test_rows_are_counted_in_bits_and_bytes(run, tmp_path):
    code, report, out = run("float32", "bfloat16", "int8", "int4, packed")
    assert code == 0 and report["agree"]
    found = report["rows"]
    assert list(found) == ["float32", "bfloat16", "int8"]
    matrices = LAYERS * 4 * CHANNELS**2 + LAYERS * (2 * 4 + 1) * CHANNELS**2
    assert found["float32"]["bits_per_weight"] == 32 and found["bfloat16"]["bits_per_weight"] == 16
    # A byte a weight, and a scale of four bytes a row, which may have an offset of one.
    rows = LAYERS * CHANNELS * (4 + 4 + 1 + 1)
    scales = round(found["int8"]["bits_per_weight"] / 8 * matrices) - matrices
    assert scales in (4 * rows, 5 * rows)
    saved = found["bfloat16"]["bytes_on_disk"] - found["int8"]["bytes_on_disk"]
    assert abs(saved - (matrices - scales)) < 50_000  # names, and vectors of more bits
    assert abs(found["float32"]["bits_per_byte"] - found["int8"]["bits_per_byte"]) < 0.1
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] == 12345678 for row in found.values())
    assert "GPUs only" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_while_a_matrix_answers_otherwise_than_it_should(run, quantization, monkeypatch):
    stands_for = quantization.stands_for
    monkeypatch.setattr(quantization, "stands_for", lambda *arguments: 1.1 * stands_for(*arguments))
    code, report, out = run("bfloat16")
    assert code == 1 and not report["agree"]
    assert "tokens_per_second" not in report["rows"]["bfloat16"] and "nothing was measured" in out
