"""Two processes share the work, of the harness's command and of `rwkv eval`, and find what one finds in Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from modeling_rwkv import demo_model_path
from rwkv_eval.harness import RwkvLM
from rwkv_eval.zero_shot import SAMPLE, evaluate

ROOT = Path(__file__).resolve().parents[1]
TASK = """
task: fox
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def in_two_processes(folder: Path, *program: str | Path) -> str:
    """Run a module under `accelerate launch` in `folder`; what it says on stderr."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "finetune/configs/ddp.yaml"]
    launcher += ["--num_processes", "2", "--main_process_port", "0", "-m"]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *launcher, *program],
        cwd=folder,
        env=os.environ | environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_processes_of_the_command_share_the_questions(tmp_path):
    options = ["--quick", "--tasks", "piqa,lambada_openai", "--limit", "7", "--output", "out"]
    in_two_processes(tmp_path, "modeling_rwkv.cli", "eval", *options)
    (path,) = (tmp_path / "out").iterdir()  # and no answers that were kept
    alone = evaluate(tasks=["piqa", "lambada_openai"], data=SAMPLE, limit=7)
    found = json.loads(path.read_text())["results"]
    for task, metrics in alone["results"].items():
        # But for standard errors that are drawn, from documents in another order.
        numbers = {name: x for name, x in metrics.items() if isinstance(x, float) and "stderr" not in name}
        assert numbers == pytest.approx({name: found[task][name] for name in numbers}, rel=1e-4), task


def test_processes_of_the_harness_share_the_requests(tmp_path):
    """Five documents, so that one process has more than the other."""
    words = ["forest", "big city", "sea"]
    rows = [
        {"question": "The fox ran " + "on and " * i + "to the", "choices": words, "answer": i % 3} for i in range(5)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fox.yaml").write_text(TASK % json.dumps(str(data)))
    program = ["rwkv_eval", "--model", "rwkv", "--model_args", f"pretrained={demo_model_path()},dtype=float32"]
    program += ["--tasks", "fox", "--include_path", tmp_path, "--batch_size", "2"]
    program += ["--log_samples", "--output_path", tmp_path / "results"]
    assert "contexts for fox on rank 1" in in_two_processes(tmp_path, *program)

    pairs = [(row["question"], f" {word}") for row in rows for word in words]
    model = RwkvLM(str(demo_model_path()), dtype="float32", device="cpu")
    alone = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    (samples,) = (tmp_path / "results").rglob("samples_fox_*.jsonl")
    found = {sample["doc_id"]: sample["resps"] for sample in map(json.loads, samples.read_text().splitlines())}
    shared = [answer for doc in range(len(rows)) for ((answer, *_),) in zip(found[doc], strict=True)]
    assert [flag == "True" for _, flag in shared] == [greedy for _, greedy in alone]
    assert [float(x) for x, _ in shared] == pytest.approx([x for x, _ in alone], abs=1e-4)
