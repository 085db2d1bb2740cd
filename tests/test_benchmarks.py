"""Laws about the benchmark of whole models: what it reports, and what it refuses to. No law about speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # seven programs that import torch, on a machine that may be busy

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "model.py"
TINY = ["--shape", "tiny", "--tokens", "8", "--train-shape", "2x4", "--repeats", "2", "--threads", "1"]
SIDES = {"prefill": {"ours", "built-in", "official"}, "train": {"ours", "built-in"}}


def run(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """The program in an empty folder and the report that it wrote."""
    command = [sys.executable, PROGRAM, *TINY, "--json", "report.json", "--plot", "plot.png", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, check=False)
    assert (folder / "report.json").exists(), done.stderr
    return done, json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreeing")
    return folder, *run(folder)


def test_every_side_is_timed_and_weighed(agreeing):
    _, done, report = agreeing
    assert done.returncode == 0, done.stderr
    assert report["agree"]
    for job, sides in SIDES.items():
        assert report["seconds"][job].keys() == report["memory"][job].keys() == sides
        for name in sides:
            for clock in ("wall", "cpu"):
                found = report["seconds"][job][name][clock]
                assert len(found["samples"]) == 2
                assert 0 < found["min"] <= found["median"] <= found["max"]
            assert f"{report['seconds'][job][name]['wall']['median']:.2f}" in done.stdout


def test_ratios_follow_from_the_figures_beside_them(agreeing):
    _, _, report = agreeing
    for job, sides in SIDES.items():
        for name in sides:
            wall = {side: report["seconds"][job][side]["wall"]["median"] for side in (name, "ours")}
            assert report["times_ours"][job][name]["wall"] == pytest.approx(wall[name] / wall["ours"])


def test_the_report_says_where_its_figures_come_from(agreeing):
    folder, _, report = agreeing
    assert {"date", "cpu", "cores", "threads", "versions"} <= report["environment"].keys()
    assert {"python", "torch", "transformers", "rwkv", "modeling-rwkv"} == report["environment"]["versions"].keys()
    assert report["settings"]["shape"] == "tiny"
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_no_speed_while_the_sides_disagree(tmp_path):
    done, report = run(tmp_path, "--tolerance", "0")
    assert done.returncode == 1, done.stderr
    assert not report["agree"]
    assert max(report["disagreement"]["prefill"].values()) > 0
    assert not {"seconds", "memory", "times_ours"} & report.keys()
    assert "wall" not in done.stdout
    assert not (tmp_path / "plot.png").exists()
