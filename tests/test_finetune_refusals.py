"""Laws of what the fine-tuning programs refuse: in one sentence, before work is lost."""

import json
import math
import shutil
from pathlib import Path

import pytest
from finetuning import own_cache, refusal, save_model, swapped_words, tiny_model, train  # noqa: F401 - fixtures
from models import make
from quantizing import off_gpu, quantise

from rwkv_finetune import lora
from rwkv_finetune.arguments import Refusal
from rwkv_finetune.data import DataArguments
from rwkv_finetune.merge import merge
from rwkv_finetune.run import recipe
from rwkv_finetune.run_folder import complete_checkpoints
from rwkv_finetune.trainer import RwkvTrainer


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_a_loss_that_is_no_number_stops_the_run_and_names_its_batch(batch, base, data, tmp_path, monkeypatch, capsys):
    calls = []
    compute_loss = RwkvTrainer.compute_loss

    def compute(self, model, *arguments, **options):
        calls.append(None)
        loss = compute_loss(self, model, *arguments, **options)
        return loss * math.nan if len(calls) == batch else loss

    monkeypatch.setattr(RwkvTrainer, "compute_loss", compute)
    line = refusal("full", capsys, base, data, tmp_path / "run", logging_steps=50)
    assert f"step {(batch + 1) // 2}, batch {2 - batch % 2} " in line
    assert len(complete_checkpoints(tmp_path / "run")) == (batch - 1) // 4  # none with such weights


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 1e38, "validation_share": 0, "save_strategy": "no"}, "a weight is"),
        ({"learning_rate": 1e38, "validation_share": 0, "save_steps": 1}, "a weight is"),
        ({"learning_rate": 1e20}, "validation loss after step 1 "),
        ({"learning_rate": 1e6, "validation_share": 0, "save_dtype": "float16"}, "a weight is"),
    ],
    ids=["result", "checkpoint", "loss", "dtype"],
)
def test_weights_that_are_no_numbers_are_never_kept(options, said, base, data, tmp_path, capsys):
    options = {"warmup_steps": 0, "max_steps": 1, "eval_steps": 1, "lr_scheduler_type": "constant"} | options
    assert said in refusal("full", capsys, base, data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "model").exists()
    assert said != "a weight is" or "save_steps" not in options or not complete_checkpoints(tmp_path / "run")


def test_a_disk_without_room_is_refused_before_training(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100_000))
    assert "GB free" in refusal("full", capsys, base, data, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*/*"))


@pytest.mark.parametrize(
    ("program", "options", "said"),
    [
        ("full", {"context_length": 1}, "context_length"),
        ("full", {"validation_share": 1}, "validation_share"),
        ("full", {"streaming": True, "max_steps": -1, "validation_share": 0}, "max_steps"),
        ("full", {"streaming": True}, "validation_file"),
        ("full", {"train_file": "missing.jsonl"}, "missing.jsonl"),
        ("full", {"model": "nowhere"}, "nowhere"),
        ("full", {"remove_unused_columns": True}, "remove_unused_columns"),
        ("full", {"rank": 3}, "'rank'"),
        ("full", {"learning_rate": "nan"}, "learning_rate"),
        ("full", {"learning_rate": -1}, "learning_rate"),
        ("full", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ("full", {"per_device_eval_batch_size": 0}, "per_device_eval_batch_size"),
        ("full", {"seed": -1}, "seed"),
        ("full", {"max_steps": 0}, "max_steps"),
        ("full", {"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs"),
        ("full", {"max_steps": -1, "num_train_epochs": -1}, "num_train_epochs"),
        ("full", {"fp16": True}, "fp16"),
        ("full", {"seed": 2**32}, "seed is 4294967296; it must be less than 2^32"),
        ("full", {"report_to": "foo"}, "report_to: foo"),
        ("full", {"adam_beta1": 2}, "optim adamw"),
        ("full", {"report_to": "wandb"}, "report_to"),
        ("full", {"resume_from_checkpoint": "tests"}, "checkpoint-*"),
        ("lora", {"dropout": 2}, "dropout"),
        ("lora", {"targets": "ln1"}, "ln1"),
        ("lora", {"targets": "attention"}, "attention"),
        ("lora", {"rank": 0}, "rank"),
        ("lora", {"targets": "kez"}, "kez"),
        ("lora", {"load_in": "3bit"}, "3bit"),
        pytest.param("lora", {"load_in": "4bit"}, "GPU", marks=off_gpu),
        pytest.param("lora", {"load_in": "8bit"}, "GPU", marks=off_gpu),
        ("lora", {"save_strategy": "epoch", "load_best_model_at_end": True}, "save"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(program, options, said, base, data, tmp_path, capsys):
    assert said in refusal(program, capsys, base, data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("program", "method", "options", "said"),
    [
        ("full", "int8", {}, "rwkv finetune lora"),
        ("state", "int8", {}, "rwkv finetune lora"),
        ("lora", "int8", {"load_in": "int8"}, "quantized already"),
        ("lora", "int4", {}, "8 bits"),
    ],
)
def test_what_cannot_be_trained_on_a_quantised_model_is_refused(
    program, method, options, said, data, tmp_path, capsys
):
    model = quantise(save_model(tmp_path / "tiny", hidden_size=32), method)
    assert said in refusal(program, capsys, model, data, tmp_path / "run", **options)


def test_weights_of_torchao_are_refused_in_several_processes(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora.LoraTrainingArguments, "world_size", property(lambda self: 3))
    assert "there are 3" in refusal("lora", capsys, base, data, tmp_path / "run", load_in="int8")


def test_an_adapter_is_not_merged_into_a_quantised_model(base, data, tmp_path):
    model = quantise(Path(shutil.copytree(base, tmp_path / "tiny")))
    adapter = train("lora", model, data, tmp_path / "run", max_steps=1, save_steps=1, eval_steps=1)
    with pytest.raises(Refusal, match="--base"):
        merge(adapter, tmp_path / "merged")
    assert merge(adapter, tmp_path / "merged", base=str(base)) > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no tokenizer", "tokenizer"),
        ("too many tokens", "300 tokens"),
        ("an adapter", "rwkv merge"),
        ("a state", "--state"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(change, said, base, data, tmp_path, capsys):
    model = shutil.copytree(base, tmp_path / "other")
    if change == "no tokenizer":
        for file in model.glob("tokenizer*"):
            file.unlink()
    elif change == "too many tokens":
        make({"vocab_size": 299, "hidden_size": 20, "num_hidden_layers": 2}).save_pretrained(model)
    else:
        program = "lora" if change == "an adapter" else "state"
        model = train(program, base, data, tmp_path / "earlier", max_steps=1)
    assert said in refusal("full", capsys, model, data, tmp_path / "run")


def test_a_folder_is_made_below_no_file(base, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "output_dir" in refusal("full", capsys, base, data, tmp_path / "file" / "run")


RECIPE = {  # an option, and two values of it
    **{"learning_rate": (1e-3, 1e-4), "weight_decay": (0.0, 0.1), "label_smoothing_factor": (0.0, 0.1)},
    **{"optim": ("sgd", "adamw_torch"), "optim_args": (None, "a=1"), "seed": (0, 1), "max_steps": (1, 2)},
    **{"neftune_noise_alpha": (None, 1.0), "per_device_train_batch_size": (1, 2), "context_length": (8, 9)},
    **{
        "rank": (1, 2),
        "model": ("one", "two"),
        "train_file": ("one.txt", "two.txt"),
        "validation_file": (None, "one"),
    },
}
FREE = {
    **{"output_dir": ("one", "two"), "logging_steps": (1, 2), "report_to": ("none", "tensorboard")},
    **{"dataloader_num_workers": (0, 1), "save_total_limit": (1, 2), "per_device_eval_batch_size": (1, 2)},
    **{"gradient_checkpointing": (False, True), "torch_compile": (False, True), "model": ("one", "{here}/one")},
    **{"train_file": ("one.txt", "copy.txt"), "validation_file": ("one", "{here}/one")},
}


@pytest.mark.parametrize(("option", "same"), [*((name, False) for name in RECIPE), *((name, True) for name in FREE)])
def test_a_run_is_continued_with_whatever_decides_its_result(option, same, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        Path(folder).mkdir()
    for file in ("one.txt", "two.txt", "copy.txt"):
        Path(file).write_text(file if file == "two.txt" else "text")
    recipes = []
    for value in (FREE if same else RECIPE)[option]:
        value = value.format(here=tmp_path) if isinstance(value, str) else value
        groups = (lora.LoraTrainingArguments, lora.LoraArguments, DataArguments)
        given = {"output_dir": "run", "train_file": "one.txt", option: value}
        recipes.append(
            recipe(*(group(**{k: v for k, v in given.items() if k in group.__dataclass_fields__}) for group in groups))
        )
    assert (recipes[0] == recipes[1]) == same


def test_another_kind_of_model_is_refused(base, data, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "gpt2" in refusal("full", capsys, tmp_path / "other", data, tmp_path / "run")
