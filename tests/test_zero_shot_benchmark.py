"""Laws about the benchmark of zero-shot evaluation: what it reports, and what it refuses to. No law about speed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
OPTIONS = ["--tasks", "hellaswag", "arc_easy:2", "--limit", "3", "--repeats", "2", "--batch-sizes", "1", "3"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The program in this process: its exit code, its report and what it printed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("measure", "zero_shot"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("zero_shot")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def run(*options: str) -> tuple[int, dict, str]:
        where = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plot.png")]
        monkeypatch.setattr(sys, "argv", ["zero_shot.py", *OPTIONS, *where, *options])
        return module.main(), json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return run


def test_the_report_holds_what_was_compared_counted_and_timed(run, tmp_path):
    code, report, out = run()
    assert code == 0 and report["agree"]
    assert set(report["tasks"]) == {"hellaswag", "arc_easy:2"}
    for found in report["tasks"].values():
        assert set(found["difference"]) == {"1", "3", "32"}
        assert max(found["difference"].values()) <= 1e-4 and not any(found["other_flags"].values())
        assert found["tokens"]["rwkv"] < found["tokens"]["hf"] <= found["with_padding"]["hf"]
        wall = {name: seconds["wall"]["median"] for name, seconds in found["seconds"].items()}
        assert found["times_ours"]["wall"] == pytest.approx(wall["hf"] / wall["rwkv"])
        assert f"{found['tokens']['rwkv']:,}" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_no_speed_while_the_sides_disagree(run, tmp_path):
    code, report, out = run("--tolerance", "-1")
    assert code == 1 and not report["agree"]
    assert not any("seconds" in found for found in report["tasks"].values())
    assert "speed was not measured" in out and not (tmp_path / "plot.png").exists()
