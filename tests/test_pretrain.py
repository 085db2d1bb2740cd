"""Laws of training from scratch: tokens, rows, optimizer, arguments, and a run that is killed."""

import json
import math
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml

import modeling_rwkv

pytest.importorskip("datasets")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rwkv_eval.documents import read_documents
from rwkv_finetune import pretrain
from rwkv_finetune.arguments import ProgramParser, Refusal
from rwkv_finetune.optimizer import largest_logit_penalty, parameter_groups
from rwkv_finetune.packing import IGNORED, PackedRows, cut, pack, tokenize
from rwkv_finetune.run_folder import claim, complete_checkpoints
from rwkv_finetune.tokenizer import save_tokenizer, train_tokenizer

WORDS = "the a cat dog king sun moon sat ran saw loved found under over with and then slowly one day"


def story(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS.split()) for _ in range(words)).capitalize() + "."


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    """Training and validation files."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("texts")
    for name, documents in (("train.txt", 120), ("valid.txt", 20)):
        stories = [story(rng, rng.randrange(3, 60)) for _ in range(documents)]
        (folder / name).write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    return folder / "train.txt", folder / "valid.txt"


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(read_documents(texts[0]), 300)


# Documents and tokens


def test_documents_are_what_is_between_separator_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\n\nstill one <|endoftext|> \n<|endoftext|>\n \n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert list(read_documents(path)) == ["one\r\n\nstill one <|endoftext|> ", "two"]


@pytest.mark.parametrize("content", [b"", b" \n<|endoftext|>\n\n", b"\xff\xfe", None])
def test_a_file_without_documents_is_refused_by_name(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.txt"):
        list(read_documents(path))


def random_text(rng: random.Random) -> str:
    ranges = [(0, 128), (0x20, 0x7F), (0xA0, 0x250), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x200B, 0x2010)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def test_decoding_gives_back_every_text(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rng = random.Random(1)
    fixed = ["", " ", "\n\n", " a  b ", "don 't .", "e\u0301 👩‍👩‍👧 你好\x00\x7f", "a<|endoftext|>b<|padding|>"]
    for text in fixed + [random_text(rng) for _ in range(300)]:
        assert loaded.decode(loaded(text)["input_ids"]) == text
        plain = loaded(text, split_special_tokens=True)["input_ids"]
        assert loaded.decode(plain) == text and not set(plain) & {0, 1}


def test_special_tokens_are_those_of_rwkv_4(tokenizer):
    assert tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>"]) == [0, 1]
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert ids == (0, 0, 0, 1)
    assert tokenizer("cat")["input_ids"] == tokenizer("cat", add_special_tokens=False)["input_ids"]


def test_the_same_text_gives_the_same_tokenizer(texts, tokenizer):
    again = train_tokenizer(read_documents(texts[0]), 300)
    assert again.get_vocab() == tokenizer.get_vocab() and len(again) <= 300


def test_a_tokenizer_folder_is_never_overwritten(tokenizer, tmp_path):
    with pytest.raises(FileExistsError):
        save_tokenizer(tokenizer, tmp_path)


# Packing


def sequences(row: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of each sequence of a row, as a model that reads `position_ids` sees them."""
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    bounds = [*starts, len(row["position_ids"])]
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    return [(ids[a:b], labels[a:b]) for a, b in zip(starts, bounds[1:], strict=True)]


@pytest.mark.parametrize("block_size", [2, 3, 17, 64, 1000])
@pytest.mark.parametrize("start_every", [0, 1, 2])
def test_rows_hold_every_document_and_never_mix_two(texts, tokenizer, block_size, start_every):
    documents = list(read_documents(texts[0]))
    stream = tokenize(documents, tokenizer, start_every, "text")
    rows = PackedRows(stream, block_size, pad_token_id=1)
    expected = []
    for index, text in enumerate(documents):
        start = [0] if start_every and index % start_every == start_every - 1 else []
        expected.append([*start, *tokenizer(text)["input_ids"], 0])

    pieces = []
    for row in rows:
        assert all(len(column) == block_size for column in row.values())
        for ids, labels in sequences(row):
            if set(labels) != {IGNORED}:
                pieces.append(ids)
                assert labels == [IGNORED, *ids[1:]]
            else:
                assert set(ids) == {1}  # padding is a sequence of its own

    # Cutting each document again must give exactly the pieces that were found, no more and no less.
    wanted = []
    for document in expected:
        whole = [document[a : a + n] for a, n in cut([0, len(document)], block_size)]
        assert [*whole[0], *(token for piece in whole[1:] for token in piece[1:])] == document
        wanted += whole
    assert sorted(pieces) == sorted(wanted)
    predicted = sum(int((row["labels"] != IGNORED).sum()) for row in rows)
    assert predicted == sum(len(document) - 1 for document in expected)


def test_packing_fits_best():
    assert pack([(0, 5), (5, 4), (9, 6), (15, 5), (20, 10)], 10) == [[(20, 10)], [(9, 6), (5, 4)], [(0, 5), (15, 5)]]


def test_every_piece_of_many_is_packed_once():
    rng = random.Random(2)
    pieces = [(i, rng.randrange(2, 100)) for i in range(2000)]
    rows = pack(pieces, 100)
    assert sorted(piece for row in rows for piece in row) == pieces
    assert all(sum(length for _, length in row) <= 100 for row in rows)


def test_a_packed_row_has_the_loss_of_its_documents_alone(texts, tokenizer):
    documents = list(read_documents(texts[0]))[:6]
    rows = PackedRows(tokenize(documents, tokenizer, 2, "text"), 64, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(tiny_config(len(tokenizer)))
    packed, alone = 0.0, 0.0
    with torch.no_grad():
        for row in rows:
            batch = {name: column[None] for name, column in row.items()}
            packed += model(**batch, num_items_in_batch=1).loss.item()
            for ids, labels in sequences(row):
                if set(labels) != {IGNORED}:
                    ids = torch.tensor([ids])
                    alone += model(ids, labels=ids, num_items_in_batch=1).loss.item()
    assert packed == pytest.approx(alone, rel=1e-5)


def tiny_config(vocab_size: int = 300):
    return modeling_rwkv.RwkvConfig(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2)


# The optimizer


def test_groups_hold_every_parameter_once_at_its_rate():
    model = AutoModelForCausalLM.from_config(tiny_config())
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        multiplier = 2 if name.endswith("time_decay") else 3 if name.endswith("time_first") else 1
        assert group["lr"] == pytest.approx(multiplier * 1e-3), name
        is_matrix = parameter.squeeze().ndim == 2
        assert group["weight_decay"] == (0.1 if is_matrix else 0.0), name


def test_frozen_parameters_are_in_no_group():
    model = AutoModelForCausalLM.from_config(tiny_config()).requires_grad_(False)
    model.head.weight.requires_grad_(True)
    (group,) = parameter_groups(model, 1e-3)
    assert [p is model.head.weight for p in group["params"]] == [True]


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5), (4, 7, 31)])
def test_the_penalty_pulls_only_the_largest_logits(shape):
    logits = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(largest_logit_penalty(logits, 1e-4), logits)
    largest = logits.detach().max(-1, keepdim=True)
    expected = torch.zeros_like(logits).scatter(-1, largest.indices, largest.values * 1e-4 / (shape[0] * shape[1]))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


# Arguments


@dataclass
class Options:
    width: int = field(default=1)
    rate: float = field(default=0.1)
    names: list[str] = field(default_factory=list)
    flag: bool = field(default=False)
    extra: str | None = field(default=None)


def parse(tmp_path: Path, config: str, *words: str) -> Options:
    (tmp_path / "config.yaml").write_text(config)
    (options,) = ProgramParser([Options]).parse(["--config", str(tmp_path / "config.yaml"), *words])
    return options


def test_the_command_line_wins_over_the_config_and_the_config_over_defaults(tmp_path):
    config = "width: 3\nrate: 1e-3\nnames: [a b, c]\nflag: true\nextra: {min: 1}"
    expected = Options(3, 1e-3, ["a b", "c"], True, '{"min": 1}')
    assert parse(tmp_path, config) == expected
    assert parse(tmp_path, config, "--width=-4", "--flag", "false") == replace(expected, width=-4, flag=False)
    assert parse(tmp_path, "") == Options()


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ("widht: 3", [], "'widht'"),
        ("width: wide", [], "width"),
        ("width: 2.5", [], "width"),
        ("- 1", [], "mapping"),
        ("a: [", [], "YAML"),
        ("", ["--widht", "3"], "'widht'"),
        ("", ["--wid", "3"], "'wid'"),
        ("", ["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path, capsys, config, words, said):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, config, *words)
    printed = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in printed and "\n" not in printed


# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train_file", "missing.txt"], "missing.txt"),
        (["--validation_file", "empty.txt"], "empty.txt"),
        (["--block_size", "1"], "block_size"),
        (["--vocab_size", "100"], "vocab_size"),
        (["--hidden_size", "0"], "hidden_size"),
        (["--hidden_size", "4000000000000"], "sizes"),
        (["--intermediate_size", "-3"], "intermediate_size is -3"),
        (["--output_dir", "taken"], "taken"),
        (["--output_dir", "empty.txt"], "empty.txt"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--save_dtype", "int8"], "save_dtype"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(texts, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("taken").mkdir()
    Path("taken/thesis.tex").touch()
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*run_options(texts, tmp_path / "run"), *options])
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and said in printed and printed.startswith("error: ")
    assert not (tmp_path / "run").exists()
    assert [path.name for path in Path("taken").iterdir()] == ["thesis.tex"]


def test_a_folder_belongs_to_the_recipe_that_started_it(tmp_path):
    claim(tmp_path / "run", {"width": 1})
    claim(tmp_path / "run", {"width": 1})
    with pytest.raises(Refusal, match="width"):
        claim(tmp_path / "run", {"width": 2})


# Runs


def run_options(texts: tuple[Path, Path], output_dir: Path) -> list[str]:
    options = {
        "train_file": texts[0],
        "validation_file": texts[1],
        "output_dir": output_dir,
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "vocab_size": 300,
        "block_size": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "save_dtype": "float32",
        "disable_tqdm": "true",
    }
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(scope="session")
def finished(texts, tmp_path_factory) -> Path:
    """The output folder of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    pretrain.main(run_options(texts, folder))
    return folder


KILLED = """
import os, signal, sys, torch
from rwkv_finetune import pretrain, trainer

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def saves(steps):
    return lambda self, *args: kill() if self.state.global_step == steps else original(self, *args)

moment, *argv = sys.argv[1:]
if moment == "during the save of step 4":  # weights are written, the rest is not
    original = trainer.RwkvTrainer._save_rng_state
    trainer.RwkvTrainer._save_rng_state = saves(4)
elif moment == "at step 3":
    original = trainer.RwkvTrainer.log
    trainer.RwkvTrainer.log = lambda self, *args: saves(3)(self, *args)
elif moment == "while the result is written":
    pretrain.save_result = kill
pretrain.main(argv)
"""


@pytest.mark.parametrize(
    ("moment", "kept"),
    [("at step 3", [2]), ("during the save of step 4", [2]), ("while the result is written", [4, 6])],
)
def test_a_killed_run_continues_to_the_same_bits(texts, finished, tmp_path, moment, kept):
    options = run_options(texts, tmp_path / "run")
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, *options], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == [f"checkpoint-{n}" for n in kept]
    pretrain.main(options)
    weights = [(run / "model/model.safetensors").read_bytes() for run in (finished, tmp_path / "run")]
    assert weights[0] == weights[1]
    losses = [[entry["loss"] for entry in history(run) if "loss" in entry] for run in (finished, tmp_path / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def history(run: Path) -> list[dict[str, float]]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def test_a_run_learns_and_keeps_only_its_last_checkpoints(finished):
    losses = [entry["loss"] for entry in history(finished) if "loss" in entry]
    assert losses[-1] < losses[0]
    assert [path.name for path in complete_checkpoints(finished)] == ["checkpoint-4", "checkpoint-6"]


def test_another_recipe_does_not_continue_the_run(texts, finished, capsys):
    with pytest.raises(SystemExit):
        pretrain.main([*run_options(texts, finished), "--hidden_size=32"])
    assert "hidden_size" in capsys.readouterr().err


def test_the_result_loads_with_all_that_belongs_to_it(finished):
    folder = finished / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, modeling_rwkv.RwkvForCausalLM)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (0, 1)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert AutoConfig.from_pretrained(folder).use_cache


def test_the_card_tells_the_truth(finished, texts):
    _, front_matter, card = (finished / "model/README.md").read_text().split("---\n", 2)
    (result,) = yaml.safe_load(front_matter)["model-index"]
    said = result["results"][0]["metrics"][0]["value"]
    loss, bits_per_byte = measured_alone(finished / "model", texts[1])
    assert said == pytest.approx(bits_per_byte, abs=1e-4)
    assert "longer document" in card and f"| {said:.4f} |" in card and "--hidden_size=16" in card
    assert history(finished)[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["hidden_size"] == 16 and "train_file" not in settings


def measured_alone(folder: Path, file: Path) -> tuple[float, float]:
    """Nats per predicted token and bits per byte, piece by piece, without packing or Trainer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nats, text_nats, tokens, size = 0.0, 0.0, 0, 0
    for text in read_documents(file):
        ids = [0, *tokenizer(text)["input_ids"], 0]
        for start, length in cut([0, len(ids)], 32):
            piece = torch.tensor(ids[start : start + length])
            with torch.no_grad():
                predicted = model(piece[None]).logits[0, :-1].log_softmax(-1)
            losses = -predicted.gather(-1, piece[1:, None])[:, 0]
            nats += losses.sum().item()
            text_nats += losses[piece[1:] != 0].sum().item()
            tokens += length - 1
        size += len(text.encode())
    return nats / tokens, text_nats / math.log(2) / size
