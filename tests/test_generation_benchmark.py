"""Laws about the benchmark of generation: what it times, and what it refuses to. No law about speed."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SIDES = {"ours", "GPT-NeoX"}


@pytest.fixture
def generation(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("measure", "sides", "generation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return importlib.import_module("generation")


@pytest.fixture
def parse(generation, monkeypatch):
    def parse(*options: str):
        words = [str(FOLDER / "generation.py"), "--shape", "tiny", "--tokens", "3", "5", *options]
        monkeypatch.setattr(sys, "argv", words)
        return generation.arguments()

    return parse


@pytest.fixture
def run(generation, parse, tmp_path, capsys):
    """The program in this process: its exit code, its report and what it printed."""

    def run(*options: str) -> tuple[int, dict, str]:
        parse(*options, "--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plot.png"))
        return generation.main(), json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return run


def test_both_sides_are_timed_and_weighed_at_every_length(run, tmp_path):
    code, report, out = run("--repeats", "2")
    assert code == 0 and report["agree"]
    assert set(report["seconds"]) == set(report["peak_bytes"]) == set(report["growth"]) == SIDES
    for side in SIDES:
        assert list(report["seconds"][side]) == list(report["peak_bytes"][side]) == ["3", "5"]
        for clock in ("wall", "cpu"):
            few, many = (report["seconds"][side][n][clock] for n in ("3", "5"))
            assert len(few["samples"]) == len(many["samples"]) == 2
            assert all(0 < less < more for less, more in zip(few["samples"], many["samples"], strict=True))
            assert f"{many['median']:.2f}" in out
        assert 0 <= report["peak_bytes"][side]["3"] <= report["peak_bytes"][side]["5"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_while_a_cache_is_off(run, tmp_path):
    code, report, out = run("--tolerance", "0")
    assert code == 1 and not report["agree"]
    assert not {"seconds", "peak_bytes", "growth"} & report.keys()
    assert "wall" not in out and not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("side", sorted(SIDES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_that_forgets_is_seen(generation, parse, side, dtype):
    args = parse("--dtype", dtype)
    model = generation.load(side, args)
    assert generation.disagreement(model) <= args.tolerance
    right = model.forward
    model.forward = lambda **inputs: right(**inputs | {"past_key_values": None})
    assert generation.disagreement(model) > args.tolerance


@pytest.mark.parametrize("side", sorted(SIDES))
@pytest.mark.parametrize("pieces", [[9], [1, 8], [4, 1, 4]])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_text_in_pieces_is_the_text(generation, parse, side, pieces, zeros):
    """Which are what peaks are measured by. Every token is read once, counted and timed, whatever it is."""
    model = generation.load(side, parse())
    if zeros:
        model.get_output_embeddings().weight.data.zero_()
    whole, parts, clock = generation.Writer(model), generation.Writer(model), generation.Clock([1, 4, 9])
    whole.write(9, clock)
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda module, inputs, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    for tokens in pieces:
        parts.write(tokens)
    assert read == [1] * 9
    assert whole.ids.shape == (1, 10) and torch.equal(whole.ids, parts.ids)
    assert clock.tokens == 9 and list(clock.seconds) == [1, 4, 9]
    assert whole.cache.get_seq_length() == parts.cache.get_seq_length() == 9


@pytest.mark.parametrize("power", [1, 1.7, 2])
def test_growth_is_the_power_of_the_end(generation, power):
    assert generation.growth({2: 5.0, 100: 100**power, 700: 700**power}) == pytest.approx(power)
    assert math.isclose(generation.growth({4: 1.0, 8: 4.0}), 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "8"], "two or more"),
        (["--tokens", "8", "4"], "rise"),
        (["--tokens", "0", "4"], "from 1 on"),
        (["--repeats", "0"], "repeats is 0"),
        (["--shape", "2x96x50"], "multiple of 64"),
        (["--shape", "0x64x50"], "0x64x50"),
        (["--shape", "huge"], "huge"),
    ],
)
def test_bad_input_is_refused(parse, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        parse(*options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
