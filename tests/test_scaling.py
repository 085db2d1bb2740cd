"""Laws of loss against compute: what is counted, what is fitted, and that nothing is trained twice."""

import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make, text
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("datasets")

from rwkv_finetune.trainer import RwkvTrainer

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
WORDS = "the a cat dog king sun moon sat ran saw loved found under over with and then slowly one day"
SIZES = ["1x8", "2x8", "1x16"]
OPTIONS = ["--vocab_size=280", "--block_size=16", "--max_steps=3", "--eval_steps=1", "--disable_tqdm=true"]


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("measure", "scaling"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return importlib.import_module("scaling")


@pytest.fixture
def run(scaling, monkeypatch, tmp_path, capsys):
    """The program in this process: its report and what it printed."""
    rng = random.Random(0)
    for name in ("train.txt", "valid.txt"):
        stories = (" ".join(rng.choices(WORDS.split(), k=20)) for _ in range(12))
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(stories))
    monkeypatch.chdir(tmp_path)
    files = ["--train_file=train.txt", "--validation_file=valid.txt", "--output_dir=runs"]

    def run(*options: str) -> tuple[dict, str]:
        where = ["--json=report.json", "--plot=plot.png"]
        monkeypatch.setattr(sys, "argv", ["scaling.py", *files, *OPTIONS, *where, "--sizes", *SIZES, *options])
        scaling.main()
        return json.loads(Path("report.json").read_text()), capsys.readouterr().out

    return run


@pytest.mark.parametrize("shape", ["one layer", "wide attention", "narrow attention"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_compute_is_that_of_the_matrices_of_a_training_step(scaling, shape, tokens):
    model = make(shape)
    ids = text(1, tokens, model.config.vocab_size)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    assert counter.get_total_flops() == tokens * scaling.compute_of_a_token(model)


@pytest.mark.parametrize("exponent", [-0.3, -0.01])
def test_a_power_law_is_found(scaling, exponent):
    compute = np.geomspace(1e3, 1e15, 5)
    law = scaling.power_law(list(zip(compute, 7 * compute**exponent, strict=True)))
    assert (law.coefficient, law.exponent, law.r2) == pytest.approx((7, exponent, 1))
    assert law(1e9) == pytest.approx(7 * 1e9**exponent)


def test_r2_is_the_share_of_the_variance_of_logarithms_that_the_line_explains(scaling):
    points = [(1e3, 5.0), (1e4, 4.5), (1e6, 2.0), (1e7, 2.2)]
    law = scaling.power_law(points)
    logs = np.log([loss for _, loss in points])
    left = np.log([law(compute) for compute, _ in points]) - logs
    assert law.r2 == pytest.approx(1 - left.var() / logs.var()) and 0.5 < law.r2 < 0.99


def test_every_size_is_trained_on_the_same_rows_once(run, monkeypatch):
    report, out = run()
    assert list(report["sizes"]) == SIZES
    for found in report["sizes"].values():
        compute, losses = zip(*found["points"], strict=True)
        assert list(compute) == sorted(compute) and len(compute) >= 3
        assert compute[-1] == pytest.approx(found["compute_of_a_token"] * found["tokens"])
        assert f"{losses[-1]:.4f}" in out
    assert len({found["tokens"] for found in report["sizes"].values()}) == 1
    assert 0 <= report["law"]["r2"] <= 1
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(RwkvTrainer, "train", refuse)
    again, _ = run()
    assert again["law"] == report["law"]
    with pytest.raises(SystemExit) as stop:
        run("--learning_rate=1e-3")
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "1x8", "2x8"], "three or more"),
        (["--sizes", "1x8", "2x8", "1x8", "1x16"], "different"),
        (["--sizes", "1x8", "2x8", "large"], "large"),
        (["--sizes", "1x8", "2x8", "0x8"], "0x8"),
        (["--hidden_size", "8"], "hidden_size"),
        (["--hidden_size=8"], "hidden_size"),
        (["--learning_rat", "1"], "learning_rat"),
        (["--train_file", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(run, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(Path().glob("runs/*/checkpoint-*"))
