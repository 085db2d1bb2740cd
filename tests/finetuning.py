"""What the fine-tuning programs are tried on: a random model with a tokenizer, rows of a few words, short runs."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from models import make
from torch import nn

pytest.importorskip("datasets")

import datasets

from rwkv_finetune import full, lora, state
from rwkv_finetune.tokenizer import train_tokenizer

PROGRAMS = {"lora": lora, "full": full, "state": state}
RESULTS = {"lora": "adapter", "full": "model", "state": "state"}
WORDS = "the a cat dog king sun moon sat ran saw loved found under over with and then slowly one day"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def save_model(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Two layers, 20 channels unless ``sizes`` say otherwise."""
    shape = {"vocab_size": 300, "hidden_size": 20, "num_hidden_layers": 2} | sizes
    make(shape, seed=seed, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    train_tokenizer([WORDS] * 3, 300).save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(name="base", scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer."""
    return save_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(name="data", scope="module")
def swapped_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    rows = [
        {"prompt": f"{a} {b}", "completion": f" {b} {a}"} for a, b in (rng.sample(WORDS.split(), 2) for _ in range(40))
    ]
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


def words(base: Path, data: Path, output_dir: Path, **options) -> list[str]:
    """The command line of six steps, measured and saved at every other one."""
    settings = {
        "model": base,
        "train_file": data,
        "output_dir": output_dir,
        "validation_share": 0.2,
        "context_length": 32,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 2,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "logging_steps": 1,
        "learning_rate": 0.02,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    return [f"--{key}={value}" for key, value in (settings | options).items()]


def train(program: str, base: Path, data: Path, output_dir: Path, **options) -> Path:
    """Run a program; the folder of its result."""
    PROGRAMS[program].main(words(base, data, output_dir, **options))
    return output_dir / RESULTS[program]


def refusal(program: str, capsys: pytest.CaptureFixture[str], *arguments, **options) -> str:
    """The line that says why a program does not run."""
    with pytest.raises(SystemExit) as stop:
        train(program, *arguments, **options)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def history(run: Path) -> list[dict[str, float]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def logits(model: nn.Module) -> torch.Tensor:
    """Of a text of 58 tokens, evaluated."""
    with torch.no_grad():
        return model.eval()(torch.arange(2, 60)[None]).logits
