"""Laws of training in many processes: two do what one does with the same rows, killed and resumed or not."""

import json
import os
import random
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from models import agree
from safetensors.torch import load_file

from modeling_rwkv import RwkvForCausalLM, demo_model_path
from rwkv_finetune import lora, pretrain
from rwkv_finetune.run_folder import complete_checkpoints

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "finetune" / "configs"
LAUNCHED = ROOT / "tests" / "launched.py"
# Else accelerate calls it cpu:0, a name by which transformers 5.15 cannot load a checkpoint.
ON_A_CPU = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
SAME = {"rtol": 1e-4, "atol": 1e-5}  # six steps of float32 sums in another order
WORDS = "the a cat dog king sun moon sat ran saw loved found under over with and then slowly one day"


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """Of a training run of six steps, but for its rows per device and its folder."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("texts")
    for name, documents in (("train", 60), ("validation", 5)):
        stories = [" ".join(rng.choice(WORDS.split()) for _ in range(rng.randrange(3, 60))) for _ in range(documents)]
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    options = {
        "train_file": folder / "train.txt",
        "validation_file": folder / "validation.txt",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "vocab_size": 300,
        "block_size": 32,
        "max_steps": 6,
        "save_steps": 2,
        "eval_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "logit_penalty": 0,
        "save_dtype": "float32",
        "disable_tqdm": "true",
        "report_to": "none",
    }
    return [f"--{key}={value}" for key, value in options.items()]


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Path:
    """The folder of a run in one process, with eight rows a step."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    pretrain.main([*options, "--per_device_train_batch_size=8", f"--output_dir={folder}"])
    return folder


def command(config: str, *options: str | Path) -> list[str | Path]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    return [*launcher, "--config_file", CONFIGS / f"{config}.yaml", *options]


def launch(config: str, *program: str | Path) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` a program in two processes on this machine."""
    words = command(config, "--main_process_port", "0", *program)
    return subprocess.run(words, capture_output=True, text=True, timeout=200, env=ON_A_CPU, check=False)


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


SHARDED = {"fsdp2": "pytorch_model_fsdp.bin", "zero2": "global_step4", "zero3": "global_step4"}  # in a checkpoint
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed")


@pytest.mark.parametrize(
    "config",
    ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_two_processes_train_like_one_though_they_are_killed(config, options, alone, tmp_path):
    """The curve, from before and after the kill, and the final weights; within SAME."""
    run = tmp_path / "run"
    program = ["rwkv_finetune.pretrain", *options, "--per_device_train_batch_size=4", f"--output_dir={run}"]
    as_if = ["--as-if-gpus"] if config == "fsdp2" else []
    killed = launch(config, LAUNCHED, *as_if, "--die-at=5", *program)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr, killed.stderr[-3000:]
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    found = {path.name for path in (run / "checkpoint-4").iterdir()} & set(SHARDED.values())
    assert found == ({SHARDED[config]} if config in SHARDED else set())

    finished = launch(config, LAUNCHED, *as_if, *program)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert f"continuing from {run / 'checkpoint-4'}" in finished.stdout
    assert losses(run) == pytest.approx(losses(alone), rel=SAME["rtol"]) and len(losses(run)) == 6
    agree(load_file(run / "model/model.safetensors"), load_file(alone / "model/model.safetensors"), **SAME)
    RwkvForCausalLM.from_pretrained(run / "model")


def test_two_machines_train_like_one(options, alone, tmp_path):
    """Both are this one, with one process each; they share the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    program = ["-m", "rwkv_finetune.pretrain", *options, "--per_device_train_batch_size=4"]
    logs = [tmp_path / f"machine-{rank}.log" for rank in (0, 1)]
    machines = []
    for rank, log in enumerate(logs):
        words = command("ddp", *where, f"--machine_rank={rank}", *program, f"--output_dir={tmp_path / 'run'}")
        with log.open("w") as file:
            machines.append(subprocess.Popen(words, stdout=file, stderr=file, env=ON_A_CPU))
    try:
        codes = [machine.wait(timeout=200) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=SAME["rtol"])


def test_two_processes_train_an_adapter_like_one(tmp_path):
    """Cut in parts, activations recomputed, the model's own vectors trained with it; and its file is the same."""
    rng = random.Random(0)
    pairs = [
        {"prompt": " ".join(rng.choices(WORDS.split(), k=3)), "completion": " ".join(rng.choices(WORDS.split(), k=n))}
        for n in range(2, 30)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = {
        "model": demo_model_path(),
        "train_file": tmp_path / "pairs.jsonl",
        "validation_share": 0.1,
        "context_length": 32,
        "train_vectors": "true",
        "gradient_checkpointing": "true",
        "max_steps": 3,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "disable_tqdm": "true",
        "report_to": "none",
    }
    program = [f"--{key}={value}" for key, value in options.items()]
    alone, run = tmp_path / "alone", tmp_path / "run"
    lora.main([*program, "--per_device_train_batch_size=4", f"--output_dir={alone}"])
    program += ["--per_device_train_batch_size=2", f"--output_dir={run}"]
    finished = launch("fsdp2", LAUNCHED, "--as-if-gpus", "rwkv_finetune.lora", *program)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert losses(run) == pytest.approx(losses(alone), rel=SAME["rtol"]) and len(losses(run)) == 3
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, alone)]
    agree(*adapters, rtol=0, atol=1e-3)  # after Adam has moved each weight by up to 0.03


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_every_config(file):
    config = load_config_from_file(str(file))
    assert config.num_processes > 1 and config.mixed_precision == "no"
    if config.distributed_type == "FSDP":
        assert [config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]] == RwkvForCausalLM._no_split_modules
    if config.distributed_type == "DEEPSPEED":
        assert file.stem == f"zero{config.deepspeed_config['zero_stage']}"
