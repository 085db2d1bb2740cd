"""Laws of zero-shot evaluation: the harness's questions and numbers, from whatever files, or one sentence."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("lm_eval")

import lm_eval
import torch
from finetuning import own_cache, save_model  # noqa: F401 - a fixture of every test
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import modeling_rwkv
from modeling_rwkv import cli
from rwkv_eval import zero_shot
from rwkv_eval.harness import RwkvLM
from rwkv_eval.local_data import COLUMNS, GROUP, SHORT_NAMES, EvalError
from rwkv_eval.zero_shot import SAMPLE, TASKS, evaluate, find_tasks, index
from rwkv_kernels.wkv4 import BACKENDS

FIELDS = [(task, column) for task, columns in COLUMNS.items() for column in columns]
COUNTED = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "headqa_en": "acc_norm", "openbookqa": "acc_norm"}
COUNTED = dict.fromkeys(COLUMNS, "acc") | COUNTED | {"record": "em"}


def file_name(task: str) -> str:
    return f"{SHORT_NAMES.get(task, task)}.jsonl"


def rows_of(task: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / file_name(task)).read_text().splitlines()]


def write_rows(folder: Path, task: str, rows: list[dict], ending: str = ".jsonl") -> Path:
    path = folder / f"{task}{ending}"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def requests(task, num_fewshot: int = 0) -> list[tuple]:
    """What a model would be asked: (context, continuation) of all documents."""
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(3)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def load(data: Path, task: str):
    ((found,), _) = find_tasks(index([task]), [task], data)
    return found


@pytest.fixture(scope="module")
def group():
    ((group,), missing) = find_tasks(index([GROUP]), [GROUP], SAMPLE)
    assert not missing
    return group


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> dict:
    return evaluate(str(folder), data=SAMPLE, batch_size=3, cache=tmp_path_factory.mktemp("results"))


# Tasks


def test_the_harness_validates_them():
    command = [sys.executable, "-m", "lm_eval", "validate", "--tasks", GROUP, "--include_path", str(TASKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "All tasks found and valid" in done.stdout, done.stderr


@pytest.mark.parametrize("task", COLUMNS)
def test_only_the_source_of_documents_differs_from_the_harness(group, task):
    own = group.get(task).config
    if task == "record":
        assert own.metadata["config_source"] == "inline"  # the harness's needs a module that transformers has no more
        return
    theirs = load_yaml(index([task]).task_index[task].yaml_path)
    for key, value in theirs.items():
        if key not in ("task", "tag", "metadata", "dataset_path", "dataset_name") and not key.endswith("_split"):
            assert own[key] == value, key


def test_record_asks_with_every_entity_and_wants_an_answer(group):
    task = group.get("record")
    doc = {"passage": "P.\n@highlight\nOne\n@highlight\nTwo", "query": "@placeholder ran.", "entities": ["U.S.", "Al"]}
    doc["answers"] = ["The US"]
    assert task.doc_to_text(doc) == "P.\n\n  - One.\n  - Two.\n"
    assert task.doc_to_choice(doc) == ["  - U.S. ran.", "  - Al ran."]
    for likelihoods, right in (((-1, -2), True), ((-2, -1), False)):
        metrics = task.process_results(doc, [(value, False) for value in likelihoods])
        assert metrics == {"em": right, "paper_acc": right}


@pytest.mark.parametrize("task", COLUMNS)
def test_a_task_says_what_the_paper_counts(group, task):
    task, counted, rng = group.get(task), COUNTED[task], random.Random(0)
    outcomes = []
    for doc in [*task.eval_docs] * 9:
        choices = task.doc_to_choice(doc) if task.config.doc_to_choice else [""]
        outcomes.append(task.process_results(doc, [(-9 * rng.random(), rng.random() < 0.5) for _ in choices]))
    assert all(outcome["paper_acc"] == outcome[counted] for outcome in outcomes)
    assert all(len({outcome[name] for outcome in outcomes}) > 1 for name in outcomes[0])
    if counted == "acc_norm":
        assert any(outcome["acc"] != outcome["acc_norm"] for outcome in outcomes)


def test_the_group_is_the_mean_of_its_tasks(results):
    tasks, group = results["results"], results["groups"][GROUP]
    assert len({tasks[task]["sample_len"] for task in COLUMNS}) > 1  # and size does not count
    assert group["paper_acc,none"] == pytest.approx(mean(tasks[task]["paper_acc,none"] for task in COLUMNS))
    assert group["perplexity,none"] == tasks["lambada_openai"]["perplexity,none"]


def test_numbers_are_those_of_the_harness_with_its_own_model(results, folder):
    manager = index([GROUP])
    found, _ = find_tasks(manager, [GROUP], SAMPLE)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    stock = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder))
    expected = lm_eval.simple_evaluate(stock, tasks=found, task_manager=manager, bootstrap_iters=1000)
    for task, metrics in expected["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: results["results"][task][name] for name in numbers}, rel=1e-4), task


# Files


@pytest.mark.parametrize("task", COLUMNS)
def test_a_task_reads_the_columns_that_it_names_and_no_more(group, task, tmp_path):
    def only(row: dict) -> dict:
        tops = {column.partition(".")[0] for column in COLUMNS[task]}
        return {key: value for key, value in row.items() if key in tops}

    write_rows(tmp_path, task, [only(row) for row in rows_of(task)])
    assert requests(load(tmp_path, task)) == requests(group.get(task))


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize(("task", "column"), FIELDS)
def test_a_missing_column_is_named_with_file_and_line(task, column, value, tmp_path):
    rows = rows_of(task)
    *outer, key = column.split(".")
    place = rows[2][outer[0]] if outer else rows[2]
    if value is None:
        place[key] = None
    else:
        del place[key]
    path = write_rows(tmp_path, task, rows)
    with pytest.raises(EvalError) as refusal:
        load(tmp_path, task)
    assert f"{path}, line 3 has no column '{column}'" in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "has no rows"),
        (b'{"text": "a b"}\n{"text"\n', "line 2 is not JSON"),
        (b'["a b"]\n', "line 1 is no JSON object"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_rows_is_refused(content, complaint, tmp_path):
    (tmp_path / "lambada.jsonl").write_bytes(content)
    with pytest.raises(EvalError, match=f"lambada.jsonl.*{complaint}"):
        load(tmp_path, "lambada_openai")


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("piqa", {"label": -1}),
        ("piqa", {"label": 2}),
        ("arc_easy", {"answerKey": "E"}),
        ("winogrande", {"answer": "3"}),
        ("copa", {"question": "reason"}),
        ("headqa_en", {"ra": 5}),
        ("boolq", {"label": "maybe"}),
    ],
)
def test_an_answer_that_is_no_choice_is_named_with_its_row(task, change, tmp_path):
    rows = rows_of(task)
    rows[4] |= change
    if task == "boolq":
        rows = [row | {"label": ["no", "yes"][row["label"]]} if i != 4 else row for i, row in enumerate(rows)]
    path = write_rows(tmp_path, task, rows)
    with pytest.raises(EvalError) as refusal:
        load(tmp_path, task)
    assert f"{path}, row 5" in str(refusal.value)


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("piqa", {"sol2": ""}),
        ("hellaswag", {"endings": ["a", "", "b", "c"]}),
        ("record", {"answers": []}),
        ("winogrande", {"sentence": "There is no gap."}),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused(task, change, row, tmp_path):
    """The first one too, which the harness looks at on its own account."""
    rows = rows_of(task)
    rows[row] |= change
    write_rows(tmp_path, task, rows)
    with pytest.raises(EvalError, match=r"correct it|check names, and the rows") as refusal:
        load(tmp_path, task)
    assert str(tmp_path) in str(refusal.value)


def test_hellaswag_may_be_clean_already(group, tmp_path):
    documents = group.get("hellaswag").eval_docs
    write_rows(tmp_path, "hellaswag", [{key: doc[key] for key in ("query", "choices", "gold")} for doc in documents])
    task = load(tmp_path, "hellaswag")
    assert requests(task) == requests(group.get("hellaswag"))
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [doc["gold"] for doc in documents]


@pytest.mark.parametrize("task", [task for task in COLUMNS if task != "winogrande"])
def test_examples_come_from_the_other_rows(group, task):
    documents = [group.get(task).doc_to_text(doc) for doc in group.get(task).eval_docs]
    asked = {context for context, _ in requests(group.get(task), num_fewshot=len(documents) - 1)}
    assert len(asked) == len(documents)
    for context in asked:
        assert all(context.count(document.strip()) == 1 for document in documents)


def test_examples_come_from_a_file_of_their_own_if_there_is_one(tmp_path):
    rows = rows_of("arc_easy")
    write_rows(tmp_path, "arc_easy", rows[:5])
    write_rows(tmp_path, "arc_easy", rows[5:], ".train.jsonl")
    for context, _ in requests(load(tmp_path, "arc_easy"), num_fewshot=3):
        assert all(row["question"] in context for row in rows[5:])
        assert sum(row["question"] in context for row in rows[:5]) == 1


def test_tasks_without_a_file_are_left_out_and_told_of(tmp_path):
    for task in ("piqa", "sciq"):
        shutil.copy(SAMPLE / file_name(task), tmp_path)
    (group,), missing = find_tasks(index([GROUP]), [GROUP], tmp_path)
    assert group.child_names == ["piqa", "sciq"]
    assert set(missing) == COLUMNS.keys() - {"piqa", "sciq"}
    with pytest.raises(EvalError, match=r"no copa\.jsonl"):
        find_tasks(index(["piqa", "copa"]), ["piqa", "copa"], tmp_path)


# Runs


def asked(monkeypatch, stop: int | None, *args, **options) -> tuple[int, dict | None]:
    """How many requests the model was given, and the results unless it was stopped after so many answers."""
    counts: list[int] = []
    answers = iter(range(stop or 10**9))
    read, keep = RwkvLM._loglikelihood_tokens, CacheHook.add_partial

    def counted(lm, requests, *rest, **kwargs):
        counts.append(len(requests))
        return read(lm, requests, *rest, **kwargs)

    def kept(hook, *answer):
        if next(answers, None) is None:
            raise KeyboardInterrupt
        keep(hook, *answer)

    with monkeypatch.context() as patch:
        patch.setattr(RwkvLM, "_loglikelihood_tokens", counted)
        patch.setattr(CacheHook, "add_partial", kept)
        try:
            found = evaluate(*args, **options)
        except KeyboardInterrupt:
            found = None
    return sum(counts), found


def test_an_interrupted_run_goes_on_where_it_was(folder, results, tmp_path, monkeypatch):
    options = {"data": SAMPLE, "batch_size": 3, "cache": tmp_path}
    every, found = asked(monkeypatch, 60, str(folder), **options)
    (answers,) = tmp_path.iterdir()
    assert found is None and every > 100
    another, _ = asked(monkeypatch, 60, str(folder), **options | {"prefix_token": "newline"})
    assert another == every and len(list(tmp_path.iterdir())) == 2  # other questions have other answers
    rest, found = asked(monkeypatch, None, str(folder), **options)
    assert every - 60 <= rest < every and not answers.exists()
    assert found["results"] == results["results"]


def test_answers_of_another_tokenizer_or_adapter_are_not_taken(folder, tmp_path):
    def fingerprint(tokenizer: Path, peft: Path | None) -> str:
        lm = zero_shot.load(str(folder), peft and str(peft), None, "cpu", "float32")
        lm.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        return zero_shot._fingerprint(lm, zero_shot.provenance(lm))

    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["key", "value"]))
    for alpha in (8, 16):
        tuned.peft_config["default"].lora_alpha = alpha
        tuned.save_pretrained(tmp_path / f"{alpha}")
    setups = [
        (folder, None),
        (modeling_rwkv.demo_model_path(), None),
        (folder, tmp_path / "8"),
        (folder, tmp_path / "16"),
    ]
    assert len({fingerprint(*setup) for setup in setups}) == len(setups)
    assert fingerprint(*setups[2]) == fingerprint(*setups[2])


@pytest.mark.parametrize("what", ["peft", "state"])
def test_an_adapter_and_a_state_count(what, folder, results, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if what == "state":
        path = tmp_path / "state.safetensors"
        with torch.no_grad():
            model(torch.arange(9)[None], use_cache=True).past_key_values.save(path)
        model.set_initial_state(path)
    else:
        path = tmp_path / "adapter"
        tuned = get_peft_model(model, LoraConfig(target_modules=["key"], init_lora_weights=False))
        tuned.save_pretrained(path)
        model = tuned.merge_and_unload()
    model.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "whole")
    options = {"data": SAMPLE}
    found = evaluate(str(folder), ["lambada_openai"], **options, **{what: str(path)})
    whole = evaluate(str(tmp_path / "whole"), ["lambada_openai"], **options)
    measured = [run["results"]["lambada_openai"]["perplexity,none"] for run in (found, whole, results)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4) and measured[0] != pytest.approx(measured[2], rel=1e-4)
    assert found["rwkv"]["weights_sha256"] != results["rwkv"]["weights_sha256"]


def test_the_hash_is_of_the_weights_alone(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert zero_shot.sha256(sharded) == zero_shot.sha256(model)
    sharded.head.weight.data[3, 2] += 1e-3
    assert zero_shot.sha256(sharded) != zero_shot.sha256(model)


def test_what_is_saved_says_what_was_run(folder, results, tmp_path):
    path = zero_shot.save(results, tmp_path)
    assert path.name.startswith("tiny-")
    assert list(tmp_path.iterdir()) == [path]
    saved = json.loads(path.read_text())
    assert saved["results"] == results["results"]
    about = saved["rwkv"]
    assert (about["model"], about["dtype"], about["prefix"]) == (str(folder), "float32", None)
    assert about["versions"]["torch"] == torch.__version__ and about["versions"]["lm_eval"] == lm_eval.__version__
    assert about["arguments"]["batch_size"] == 3 and about["wkv"] in BACKENDS and not about["skipped_tasks"]


# The command


def rwkv_eval(*arguments: object):
    return CliRunner().invoke(cli.app, ["eval", *map(str, arguments)], prog_name="rwkv")


def test_quick_prints_the_table_and_writes_the_rest(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    done = rwkv_eval("--quick", "--limit", 4, "--output", "out")
    assert done.exit_code == 0, done.stderr
    assert "fatal" not in capfd.readouterr().err  # git's, where there is no repository
    (path,) = Path("out").iterdir()
    saved = json.loads(path.read_text())
    assert saved["rwkv"]["model"] == str(modeling_rwkv.demo_model_path()) and str(path) in done.stderr
    for task in COLUMNS:
        assert f"- {task}" in done.stdout
    assert f"{saved['groups'][GROUP]['paper_acc,none']:.4f}" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "hellaswg"], ["'hellaswg'", "'hellaswag'"]),
        (["--tasks", " ,"], ["--tasks is ' ,'", "rwkv_paper"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--data", "."], ["piqa.jsonl"]),
        (["--quick", "--data", "."], ["--quick", "--data"]),
        (["--quick", "--limit", "9"], ["limit is 9", "piqa", "8 documents"]),
        (["--quick", "--limit", "0"], ["--limit is 0"]),
        (["--quick", "--num-fewshot", "8"], ["num_fewshot is 8", "piqa", "7 examples"]),
        (["--quick", "--prefix-token", "bos"], ["'bos'", "newline"]),
        (["--quick", "--peft", "nowhere"], ["peft is nowhere"]),
        (["--quick", "--peft", "damaged"], ["peft is damaged"]),
        (["--quick", "--state", "nowhere"], ["nowhere"]),
        (["--quick", "--device", "gpu"], ["'gpu'"]),
        (["--tasks", "piqa"], ["piqa cannot be loaded", "--data"]),
        (["nowhere", "--quick"], ["nowhere"]),
        (["gpt2", "--quick"], ["'gpt2'", "RWKV"]),
    ],
)
def test_what_cannot_be_is_one_sentence(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)).save_pretrained("gpt2")
    LoraConfig(target_modules=["key"]).save_pretrained("damaged")
    Path("damaged", "adapter_model.safetensors").write_bytes(b"\xff" * 99)
    done = rwkv_eval(*options)
    assert done.exit_code == 2 and done.stdout == "", done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: ") and "Traceback" not in done.stderr
    assert all(word in line for word in words), line
