"""Laws about the benchmarks: what they report, and what they refuse to. No law about speed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(900)  # a dozen programs that import torch, on a machine that may be busy

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODEL = ["model.py", "--shape", "tiny", "--tokens", "8", "12", "--train-shape", "2x4", "--repeats", "2"]
MODEL += ["--seconds", "0", "--threads", "1"]
WKV = ["wkv.py", "--device", "cpu", "--shapes", "2x9x5", "1x3x4", "--repeats", "2", "--threads", "1"]
PREFILL = {"ours", "ours without WKV", "built-in", "official", "GPT-NeoX"}
SIDES = {f"prefill {dtype} 1x{tokens}": PREFILL for dtype in ("float32", "bfloat16") for tokens in (8, 12)}
SIDES["train float32 2x4"] = PREFILL - {"official"}
SAME_FUNCTION = {"ours", "built-in", "official"}


def run(folder: Path, program: list[str], *options: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """A program in an empty folder and the report that it wrote."""
    script, *arguments = program
    command = [sys.executable, FOLDER / script, *arguments, "--json", "report.json", "--plot", "plot.png", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, check=False)
    assert (folder / "report.json").exists(), done.stderr
    return done, json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, *run(folder, MODEL)


@pytest.fixture(scope="module")
def wkv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wkv")
    return folder, *run(folder, WKV)


@pytest.fixture
def wkv_module(monkeypatch):
    """The program, to be run in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("measure", "wkv_sides", "wkv"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("wkv")


def test_every_side_is_timed(model):
    _, done, report = model
    assert done.returncode == 0, done.stderr
    assert report["agree"]
    assert {work: set(sides) for work, sides in report["seconds"].items()} == SIDES
    for work, sides in report["seconds"].items():
        for name, seconds in sides.items():
            for clock in ("wall", "cpu"):
                assert len(seconds[clock]["samples"]) == 2
                assert 0 < seconds[clock]["min"] <= seconds[clock]["median"] <= seconds[clock]["max"], (work, name)
            assert f"{seconds['wall']['median']:.3f}" in done.stdout


def test_sides_of_the_same_function_are_compared_with_ours_in_float32(model):
    _, _, report = model
    for work, found in report["disagreement"].items():
        assert set(found) == SIDES[work] & SAME_FUNCTION
        assert (found["ours"] == 0) == ("float32" in work)
        assert max(found.values()) <= report["allowed"][work]


def test_ratios_follow_from_the_figures_beside_them(model):
    _, done, report = model
    for work, sides in SIDES.items():
        wall = {name: report["seconds"][work][name]["wall"]["median"] for name in sides}
        for name in sides:
            assert report["times_ours"][work][name]["wall"] == pytest.approx(wall[name] / wall["ours"])
        cost = wall["ours"] / wall["ours without WKV"]
        assert f"{work} {cost:.3f}" in done.stdout.splitlines()[-1]


def test_the_report_says_where_its_figures_come_from(model):
    folder, _, report = model
    assert {"date", "cpu", "cores", "threads", "versions"} <= report["environment"].keys()
    assert {"python", "torch", "transformers", "rwkv", "modeling-rwkv"} == report["environment"]["versions"].keys()
    assert report["settings"]["shape"] == "tiny"
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_measured_where_it_is_asked_for(model, tmp_path):
    assert "memory" not in model[2]
    done, report = run(tmp_path, MODEL, "--tokens", "8", "--dtypes", "bfloat16", "--memory")
    assert done.returncode == 0, done.stderr
    assert set(report["memory"]["prefill bfloat16 1x8"]) == PREFILL
    assert "peak MiB" in done.stdout


@pytest.mark.parametrize("options", [("--tolerance", "0"), ("--tolerance-in-epsilons", "0", "--dtypes", "bfloat16")])
def test_no_speed_while_the_sides_disagree(tmp_path, options):
    done, report = run(tmp_path, MODEL, *options)
    assert done.returncode == 1, done.stderr
    assert not report["agree"]
    assert max(max(found.values()) for found in report["disagreement"].values()) > 0
    assert not {"seconds", "memory", "times_ours"} & report.keys()
    assert "wall" not in done.stdout
    assert not (tmp_path / "plot.png").exists()


def test_without_wkv_every_matrix_still_has_a_gradient(monkeypatch):
    """Else the difference in time would be that of the matrices before the operator, too."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "sides", raising=False)
    sides = importlib.import_module("sides")
    gradients = sides.without_wkv("tiny", 0, torch.float32).train(torch.arange(8).view(2, 4))
    assert any(name.endswith("attention.key.weight") for name in gradients)
    assert not any("time_decay" in name or "time_first" in name for name in gradients)


def test_the_operator_is_timed_forward_and_backward(wkv):
    folder, done, report = wkv
    assert done.returncode == 0, done.stderr
    assert set(report["shapes"]) == {"2x9x5", "1x3x4"}
    sides = {"cpu", "portable"} - report["missing"].keys()
    assert "portable" in sides
    for found in report["shapes"].values():
        assert set(found["errors"]) == sides
        for job in ("forward", "forward + backward"):
            assert set(found[job]["wall"]) == sides
            for wall in found[job]["wall"].values():
                assert 0 < wall["min"] <= wall["median"] <= wall["max"]
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_are_the_fewest_that_must_move(wkv):
    found = wkv[2]["shapes"]["2x9x5"]
    tensor = 2 * 9 * 5 * 4
    assert found["forward"]["bytes"] == (2 + 1) * tensor
    assert found["forward + backward"]["bytes"] == (2 + 1 + 4 + 2) * tensor


@pytest.mark.parametrize("off_by", [1.001, float("nan")])
def test_no_speed_while_the_operator_is_off(wkv_module, monkeypatch, capsys, tmp_path, off_by):
    right = wkv_module.MAKERS["cpu"]["portable"]
    monkeypatch.setitem(wkv_module.MAKERS["cpu"], "cpu", lambda: lambda *inputs: right()(*inputs) * off_by)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", [*WKV, "--json", str(tmp_path / "report.json")])
    assert wkv_module.main() == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["agree"]
    assert all("forward" not in found and set(found["off"]) == {"cpu"} for found in report["shapes"].values())
    assert "wall" not in capsys.readouterr().out


def test_a_peer_that_is_off_is_left_out_alone(wkv_module, monkeypatch, capsys):
    right = wkv_module.MAKERS["cpu"]["portable"]
    monkeypatch.setitem(wkv_module.MAKERS, "cpu", {"portable": right, "naive": lambda: lambda *x: right()(*x) * 1.001})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", WKV)
    assert wkv_module.main() == 0
    timed = [line for line in capsys.readouterr().out.splitlines() if "forward" in line]
    assert timed and not any("naive" in line for line in timed)


@pytest.mark.parametrize("element", ["float", "bfloat16"])
def test_the_naive_kernel_compiles(element):
    core = pytest.importorskip("cuda.core", reason="needs NVRTC through cuda-core")
    source = f"#define ELEMENT {element}\n{(FOLDER / 'naive_wkv4.cu').read_text()}"
    program = core.Program(source, "c++", core.ProgramOptions(arch="sm_90"))
    assert program.compile("cubin").code
