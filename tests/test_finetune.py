"""Laws of the fine-tuning programs: what is trained and saved, and runs that are stopped."""

import dataclasses
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from finetuning import (  # noqa: F401 - fixtures
    PROGRAMS,
    history,
    logits,
    own_cache,
    swapped_words,
    tiny_model,
    train,
)
from models import agree, make, same
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from typer.testing import CliRunner

from modeling_rwkv import cli
from rwkv_finetune import full, lora, pretrain, speed, supervised
from rwkv_finetune.data import DataArguments, load_data
from rwkv_finetune.run import RunArguments
from rwkv_finetune.run_folder import complete_checkpoints
from rwkv_finetune.trainer import RwkvTrainer

OPTIONS = {
    "lora": {"train_vectors": True, "dropout": 0.1},
    "full": {"save_dtype": "float32"},
    "state": {"learning_rate": 0.3},
}


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory) -> dict[str, Path]:
    """Results of whole runs; LoRA with the vectors, and with the dropout that a resumed run must draw again."""
    folder = tmp_path_factory.mktemp("finished")
    return {program: train(program, base, data, folder / program, **OPTIONS[program]) for program in PROGRAMS}


def weights(result: Path) -> dict[str, bytes]:
    """The bits of every tensor."""
    tensors = load_file(next(result.glob("*.safetensors")))
    return {name: x.view(torch.uint8).numpy().tobytes() for name, x in tensors.items()}


# Results


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_run_learns_and_says_how_much(program, finished):
    entries = history(finished[program].parent)
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert losses[-1] < (0.99 if program == "state" else 0.9) * losses[0]
    card = (finished[program] / "README.md").read_text()
    assert f"| {losses[0]:.4f} |" in card and f"| {losses[-1]:.4f} |" in card
    assert "longer document" not in card  # of which an answer is no part
    assert (finished[program] / "loss.png").stat().st_size > 0
    steps = [entry for entry in entries if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and entry["peak_memory"] > 0 for entry in steps)
    assert not list(finished[program].glob("*.bin"))


def test_an_adapter_is_the_same_however_it_is_loaded(finished, base):
    """Vectors of the model included: they are no part of PEFT's own format."""
    adapter = finished["lora"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    expected = logits(loaded)
    own = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(own) - expected).abs().max() > 0.1
    decay = "rwkv.blocks.0.attention.time_decay"
    assert (own.get_parameter(decay) - loaded.base_model.model.get_parameter(decay)).abs().max() > 1e-3
    same(logits(PeftModel.from_pretrained(own, adapter)), expected)
    same(logits(AutoModelForCausalLM.from_pretrained(adapter)), expected)
    generate = pipeline("text-generation", model=str(adapter))
    same(logits(generate.model), expected)
    assert generate("the cat", max_new_tokens=3)[0]["generated_text"].startswith("the cat")


def test_adapters_are_switched_beside_each_other(base, data, tmp_path):
    one = train("lora", base, data, tmp_path / "one", max_steps=2, train_vectors=False)
    two = train("lora", base, data, tmp_path / "two", max_steps=2, train_vectors=False, seed=1, rank=3)
    alone = {folder: logits(AutoPeftModelForCausalLM.from_pretrained(folder)) for folder in (one, two)}
    model = AutoPeftModelForCausalLM.from_pretrained(one, adapter_name="one")
    model.load_adapter(two, "two")
    for name, folder in (("one", one), ("two", two), ("one", one)):
        model.set_adapter(name)
        same(logits(model), alone[folder])
    with model.disable_adapter():
        same(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.parametrize("train_vectors", [False, True])
def test_what_is_frozen_stays_and_training_computes_what_evaluation_does(base, train_vectors):
    options = lora.LoraArguments(model=str(base), train_vectors=train_vectors)
    model = lora.adapted(AutoModelForCausalLM.from_pretrained(base), options)
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert len(trained) == 2 * 7 * 2 + train_vectors * 2 * 7  # blocks, matrices, A and B; vectors
    assert not any("head" in name or "embeddings" in name or "ln" in name for name in trained)
    torch.manual_seed(0)
    for name, x in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(x, std=0.1)
    evaluated = logits(model)
    same(model.train()(torch.arange(2, 60)[None]).logits.detach(), evaluated)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_is_the_adapter_and_its_base(dtype, finished, tmp_path):
    merged = tmp_path / "merged"
    result = CliRunner().invoke(cli.app, ["merge", str(finished["lora"]), str(merged), "--dtype", dtype])
    assert result.exit_code == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert not (merged / "adapter_config.json").exists() and model.dtype == getattr(torch, dtype)
    assert AutoTokenizer.from_pretrained(merged)("the cat") == AutoTokenizer.from_pretrained(finished["lora"])(
        "the cat"
    )
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(finished["lora"]))
    tolerance = 1e-5 if dtype == "float32" else 0.2
    agree(logits(model.float()), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("wrong", "said"), [("adapter", "no adapter"), ("base", "nowhere"), ("there", "exists")])
def test_what_cannot_be_merged_is_refused(wrong, said, finished, base, tmp_path):
    adapter = base if wrong == "adapter" else finished["lora"]
    options = ["--base", "nowhere"] if wrong == "base" else []
    out = tmp_path if wrong == "there" else tmp_path / "out"
    result = CliRunner().invoke(cli.app, ["merge", str(adapter), str(out), *options])
    assert result.exit_code == 2 and said in result.stderr.splitlines()[-1]
    assert wrong == "there" or not out.exists()


# Runs that are stopped, and runs in other ways


class Stopped(BaseException):
    """Nobody catches it, as nobody catches a kill."""


def stopped(step: int, *arguments, **options) -> None:
    """A run of `train` that ends in the middle of a step."""
    log = RwkvTrainer.log

    def stop(self, logs, *rest):
        if self.state.global_step == step and "loss" in logs:
            raise Stopped
        log(self, logs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RwkvTrainer, "log", stop)
        with pytest.raises(Stopped):
            train(*arguments, **options)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_stopped_run_continues_to_the_same_bits(program, step, finished, base, data, tmp_path):
    run = tmp_path / "run"
    stopped(step, program, base, data, run, **OPTIONS[program])
    assert len(complete_checkpoints(run)) == (step - 1) // 2
    assert weights(train(program, base, data, run, **OPTIONS[program])) == weights(finished[program])
    losses = [[e["loss"] for e in history(folder) if "loss" in e] for folder in (run, finished[program].parent)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_finished_run_is_finished_again(base, data, tmp_path):
    """Also one too short for a line in its log, which is drawn without a curve."""
    options = {"validation_share": 0, "max_steps": 1, "logging_steps": 50}
    result = train("full", base, data, tmp_path / "run", **options)
    first = weights(result)
    card = (result / "README.md").read_text()
    assert weights(train("full", base, data, tmp_path / "run", **options)) == first
    assert not (result / "loss.png").exists() and "loss.png" not in card
    seen = next(line for line in card.splitlines() if "tokens seen" in line)
    assert seen in (result / "README.md").read_text() and "| 0," not in seen


def test_a_stopped_stream_continues_to_the_same_bits(base, data, tmp_path):
    options = {"streaming": True, "validation_share": 0, "packing": False, "max_steps": 8}
    expected = weights(train("full", base, data, tmp_path / "whole", **options))
    stopped(7, "full", base, data, tmp_path / "run", **options)
    assert weights(train("full", base, data, tmp_path / "run", **options)) == expected


def test_a_method_begins_after_the_first_measurement_and_once(base, data, tmp_path, monkeypatch):
    def begin(model):
        begun.append(model.head.weight.abs().max().item())
        with torch.no_grad():
            model.head.weight.zero_()

    begun: list[float] = []
    monkeypatch.setattr(full, "METHOD", dataclasses.replace(full.METHOD, begin=begin))
    options = {"eval_steps": 1, "save_steps": 1, "max_steps": 2, "learning_rate": 0, "save_dtype": "float32"}
    stopped(2, "full", base, data, tmp_path / "run", **options)
    train("full", base, data, tmp_path / "run", **options)
    losses = [entry["eval_loss"] for entry in history(tmp_path / "run") if "eval_loss" in entry]
    assert len(begun) == 1 and begun[0] > 0
    assert losses[1:] == pytest.approx([math.log(300)] * 3, rel=1e-5) and abs(losses[0] - losses[1]) > 1e-2


def test_the_best_checkpoint_is_the_result(base, data, tmp_path):
    """At this rate every step makes it worse; the first evaluation with a checkpoint wins."""
    result = train("full", base, data, tmp_path / "run", learning_rate=3.0, warmup_steps=0, save_dtype="float32")
    entries = [e for e in history(tmp_path / "run") if "eval_loss" in e]
    saved = [e["eval_loss"] for e in entries[1:-1]]
    assert min(saved) < saved[-1]
    assert entries[-1]["eval_loss"] == pytest.approx(min(saved), rel=1e-6)
    assert f"| {min(saved):.4f} |" in (result / "README.md").read_text()
    best = weights(result)
    shutil.rmtree(result)  # as if killed before it was written
    train("full", base, data, tmp_path / "run", learning_rate=3.0, warmup_steps=0, save_dtype="float32")
    assert weights(result) == best


def test_a_stream_is_measured_and_saved_at_steps(base, data, tmp_path):
    """It has no epochs, which are the default."""
    options = {"streaming": True, "validation_share": 0, "validation_file": data, "max_steps": 4}
    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    train("full", base, data, tmp_path / "run", **options, **strategies)
    measured = [entry["step"] for entry in history(tmp_path / "run") if "eval_loss" in entry]
    assert measured == [0, 2, 4, 4] and len(complete_checkpoints(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("options", "saved", "best"),
    [
        ({}, "epoch", True),
        ({"eval_strategy": "steps", "eval_steps": 5}, "steps", True),
        ({"eval_strategy": "steps", "eval_steps": 3}, "steps", False),  # 500 is not measured
        ({"eval_strategy": "no"}, "epoch", False),
        ({"save_strategy": "no"}, "no", False),
        ({"save_strategy": "steps", "save_steps": 2}, "steps", False),
        ({"eval_strategy": "steps", "save_steps": 0.2, "eval_steps": 0.1}, "steps", True),
        ({"save_strategy": "best"}, "best", True),
        ({"load_best_model_at_end": False}, "epoch", False),
    ],
)
def test_the_best_is_kept_where_every_checkpoint_is_measured(options, saved, best, tmp_path):
    args = supervised.SupervisedArguments(str(tmp_path), report_to="none", **options)
    assert (args.save_strategy, args.load_best_model_at_end) == (saved, best)
    assert not best or (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_eval_batch_size": 1},
    ],
    ids=["recomputed", "at once", "one by one", "measured one by one"],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_other_ways_to_the_same_losses(program, options, usual, base, data, tmp_path):
    """The loss is divided by the tokens that count in all batches of a step, however they are cut."""
    assert len(usual[program]) == 6
    other = losses_of(program, base, data, tmp_path, packing=False, **options)
    assert other == pytest.approx(usual[program], rel=2e-4)


@pytest.fixture(scope="module")
def usual(base, data, tmp_path_factory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("usual")
    return {program: losses_of(program, base, data, folder / program, packing=False) for program in PROGRAMS}


def losses_of(program: str, base: Path, data: Path, output_dir: Path, **options) -> list[float]:
    """Of three steps, and of evaluations before and after."""
    both = {"max_steps": 3, "eval_steps": 3, "save_strategy": "no"}
    train(program, base, data, output_dir, **both | options)
    return [entry[key] for entry in history(output_dir) for key in ("loss", "eval_loss") if key in entry]


def test_a_way_of_reading_holds_for_training_and_evaluation(base, data, tmp_path):
    """Unless something needs logits."""
    options = {"save_strategy": "no", "report_to": "none", "per_device_train_batch_size": 4, "max_steps": 2}
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_data(DataArguments(str(data), validation_share=0.2, context_length=32), tokenizer, 0)
    given, losses = [], []
    for number, (reading, more) in enumerate([(None, {}), ({"chunk_length": 7}, {}), (None, {"validation_bytes": 1})]):
        args = RunArguments(str(tmp_path / str(number)), logging_steps=1, **options)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.register_forward_pre_hook(lambda _, __, options: given.append(options), with_kwargs=True)
        trainer = RwkvTrainer(
            model=model,
            args=args,
            train_dataset=rows.train,
            eval_dataset=rows.validation,
            data_collator=rows.collate,
            processing_class=tokenizer,
            reading=reading,
            **more,
        )
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [evaluated])
        expected = [{} if more and "labels" not in call else reading or {"skip_logits": True} for call in given]
        assert given and all(wanted.items() <= call.items() for wanted, call in zip(expected, given, strict=True))
        assert any(not wanted for wanted in expected) == bool(more)
        given.clear()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_compiled_model_has_the_same_losses(base, data, tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "eval_on_start": False, "max_steps": 2}
    packed = losses_of("full", base, data, tmp_path / "usual", eval_on_start=False, max_steps=2)
    assert losses_of("full", base, data, tmp_path / "compiled", **compiled) == pytest.approx(packed, rel=2e-4)


# Speed


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_of_the_matrices(frozen):
    model = make({"vocab_size": 31, "hidden_size": 20, "num_hidden_layers": 2})
    matrices = sum(x.numel() for name, x in model.named_parameters() if "embeddings" not in name)
    model.requires_grad_(not frozen)
    assert speed.operations_per_token(model) == (4 if frozen else 6) * matrices


def test_a_speedometer_leaves_out_what_is_no_training(monkeypatch):
    clock = iter([10, 12, 100, 103])  # start, stop, start, stop
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(clock))
    meter = speed.Speedometer()
    meter.start()
    meter.stop()
    meter.start()
    meter.stop()
    assert meter.read(50) == 10 and meter.read(50) is None


# The command


@pytest.mark.parametrize("command", [["finetune", "lora"], ["finetune", "full"], ["pretrain"]])
def test_the_command_runs_the_programs(command, monkeypatch):
    module = {"lora": lora, "full": full, "pretrain": pretrain}[command[-1]]
    given = []
    monkeypatch.setattr(module, "main", lambda argv, prog: given.append((argv, prog)))
    result = CliRunner().invoke(cli.app, [*command, "--learning_rate=1", "--bf16", "--help"], prog_name="rwkv")
    assert result.exit_code == 0 and given == [
        (["--learning_rate=1", "--bf16", "--help"], f"rwkv {' '.join(command)}")
    ]


def test_the_command_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "rwkv_finetune.lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    result = CliRunner().invoke(cli.app, ["finetune", "lora"])
    assert result.exit_code == 2 and "pip install modeling-rwkv[finetune]" in result.stderr.splitlines()[-1]


def test_the_command_lists_the_programs():
    result = CliRunner().invoke(cli.app, ["finetune"])
    assert result.exit_code == 0 and "lora" in result.stdout and "full" in result.stdout
