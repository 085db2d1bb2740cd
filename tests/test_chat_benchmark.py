"""Laws about the benchmark of talks: what it times, and what it refuses to. No law about speed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from modeling_rwkv import RwkvForCausalLM

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("measure", "sides", "chat"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return importlib.import_module("chat")


@pytest.fixture
def run(chat, monkeypatch, tmp_path, capsys):
    """The program in this process: its exit code, its report and what it printed."""

    def run(*options: str) -> tuple[int, dict, str]:
        files = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plot.png")]
        monkeypatch.setattr(sys, "argv", ["chat.py", "--turns", "3", "--repeats", "2", *files, *options])
        return chat.main(), json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out

    return run


def test_every_turn_is_timed_on_both_sides(chat, run, tmp_path):
    code, report, out = run()
    assert code == 0 and report["agree"]
    first, second, third = ([turn["tokens"][side] for side in (chat.KEPT, chat.AGAIN)] for turn in report["turns"])
    assert first[0] == first[1]
    answer = second[1] - first[1] - second[0]
    assert 20 < answer == third[1] - second[1] - third[0]  # was read when it was written, and is not again
    for turn in report["turns"]:
        for side in (chat.KEPT, chat.AGAIN):
            for clock in ("wall", "cpu"):
                found = turn["seconds"][side][clock]
                assert len(found["samples"]) == 2 and found["min"] > 0
                assert f"{found['median'] * 1e3:.1f}" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("how", ["a tolerance of 0", "a state that forgets"])
def test_nothing_is_reported_while_the_sides_differ(run, tmp_path, monkeypatch, how):
    if how == "a state that forgets":
        right = RwkvForCausalLM.forward

        def forgets(self, input_ids, **inputs):
            if input_ids.shape[1] == 1:
                for layer in inputs["past_key_values"].layers:
                    layer.wkv.mul_(torch.tensor([0.5, 1, 1])[:, None])
            return right(self, input_ids, **inputs)

        monkeypatch.setattr(RwkvForCausalLM, "forward", forgets)
    code, report, out = run(*(["--tolerance", "0"] if how == "a tolerance of 0" else []))
    assert code == 1 and not report["agree"] and "turns" not in report
    assert "all read again" not in out and not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--turns", "0"], "turns is 0"),
        (["--repeats", "0"], "repeats is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--shape", "huge"], "huge"),
    ],
)
def test_bad_input_is_refused(run, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
