"""The paper's tasks on a machine without network: from JSONL files in the fields of their data sets on the Hub.

    manager = TaskManager(include_path=...)
    missing = use_local_data(manager, "data/")  # the manager's tasks now read data/piqa.jsonl, ...

Prompts, choices and metrics stay the harness's. A file has the name of its task, one row a line: COLUMNS lists both.
Few-shot examples come from `TASK.train.jsonl` beside it, or else from the file itself, without the row that is asked.
HellaSwag may come with its texts cleaned already, as `query`, `choices` and `gold`.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

GROUP = "rwkv_paper"

# What each task reads of a row; a dot goes into an object.
COLUMNS = {
    "lambada_openai": ("text",),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_challenge": ("question", "choices.text", "choices.label", "answerKey"),
    "arc_easy": ("question", "choices.text", "choices.label", "answerKey"),
    "headqa_en": ("qtext", "answers", "ra"),
    "openbookqa": ("question_stem", "choices.text", "choices.label", "answerKey"),
    "sciq": ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
    "record": ("passage", "query", "entities", "answers"),
    "copa": ("premise", "question", "choice1", "choice2", "label"),
    "boolq": ("passage", "question", "label"),
}
SHORT_NAMES = {"lambada_openai": "lambada", "headqa_en": "headqa"}
CLEANED_HELLASWAG = ("query", "choices", "gold")


class EvalError(ValueError):
    """Why there is nothing to evaluate: what is wrong, which value, and the cure."""


def use_local_data(manager: TaskManager, folder: str | Path) -> list[str]:
    """Let the tasks of `manager` read the files in `folder`; returns those of COLUMNS that have none.

    The group `rwkv_paper` loses the tasks without a file.

    Raises:
        EvalError: no such folder, no file in it, or a row that is not what its task reads.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EvalError(f"data is {folder}, which is not a folder: give one with files such as piqa.jsonl")
    files = {name: path for name in COLUMNS if (path := _find(folder, name, ".jsonl"))}
    if not files:
        raise EvalError(f"{folder} has no data: it needs files such as {', '.join(f'{n}.jsonl' for n in COLUMNS)}")
    missing = [name for name in COLUMNS if name not in files]
    index = manager.task_index
    for name, path in files.items():
        train = _find(folder, name, ".train.jsonl")
        changes = _splits(path, train) | _check_rows(name, [path, train] if train else [path])
        index[name] = dataclasses.replace(index[name], yaml_path=None, cfg=_config(index[name]) | changes)
    group = _config(index[GROUP])
    group["task"] = [member for member in group["task"] if member["task"] not in missing]
    index[GROUP] = dataclasses.replace(index[GROUP], yaml_path=None, cfg=group)
    return missing


def check_answers(task: ConfigurableTask, limit: int | None = None) -> None:
    """Raise an EvalError that names the first row, of `limit`, whose answer is not among its choices."""
    path = task.config.dataset_kwargs["data_files"]["test"]
    for number, doc in enumerate(itertools.islice(task.eval_docs, limit), start=1):
        try:
            choices = task.doc_to_choice(doc) if task.config.doc_to_choice else None
            text, target = task.doc_to_text(doc), task.doc_to_target(doc)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, TemplateError) as error:
            raise EvalError(
                f"{path}, row {number} cannot be read as {task.task_name} ({error}): correct it"
            ) from error
        if choices is not None and "" in choices:
            raise EvalError(f"{path}, row {number}: choice {choices.index('') + 1} is empty: correct it")
        answer = text if task.multiple_input else target
        if choices is not None and answer not in (range(len(choices)) if isinstance(answer, int) else choices):
            raise EvalError(f"{path}, row {number}: the answer {answer!r} is none of its {len(choices)} choices")


def _find(folder: Path, task: str, ending: str) -> Path | None:
    paths = (folder / f"{name}{ending}" for name in (task, SHORT_NAMES.get(task, task)))
    return next((path for path in paths if path.is_file()), None)


def _config(entry: Any) -> dict[str, Any]:
    """The harness's own configuration, with its functions."""
    return load_yaml(entry.yaml_path)


def _splits(path: Path, train: Path | None) -> dict[str, Any]:
    """The keys of a task's configuration that say where its documents come from."""
    files = {"test": str(path)} | ({"train": str(train)} if train else {})
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": "train" if train else None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "train" if train else "test",
    }


def _check_rows(task: str, paths: Sequence[Path]) -> dict[str, Any]:
    """What the form of the rows changes in the configuration of `task`.

    Raises:
        EvalError: a file without rows, a line that is no JSON object, or one without a column.
    """
    changes: dict[str, Any] = {}
    for path in paths:
        wanted, number = COLUMNS[task], 0
        for number, row in _rows(path):
            if task == "hellaswag" and number == 1 and "query" in row:
                wanted, changes = CLEANED_HELLASWAG, {"process_docs": None, "doc_to_target": "gold"}
            for column in wanted:
                if not _has(row, column.split(".")):
                    raise EvalError(
                        f"{path}, line {number} has no column {column!r}: {task} needs {', '.join(wanted)}"
                    )
        if not number:
            raise EvalError(f"{path} has no rows: give it some, or remove it")
    return changes


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise EvalError(f"{path}, line {number} is no JSON object: write one row a line")
                yield number, row
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text: convert it first") from error
    except json.JSONDecodeError as error:
        raise EvalError(f"{path}, line {number} is not JSON ({error.msg}): write one row a line") from error


def _has(row: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(row, dict) or row.get(key) is None:
            return False
        row = row[key]
    return True
