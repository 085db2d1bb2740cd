"""Zero-shot evaluation by lm-evaluation-harness: find tasks and data, load the model, run, say what was run on what.

    results = evaluate("RWKV/rwkv-4-169m-pile", limit=100)
    results = evaluate(data=SAMPLE)  # the model in the box on a bundled sample, offline
    print(table(results))

`rwkv eval` is this with options. Tasks, prompts, metrics and tables are the harness's.
"""

import difflib
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval
import lm_eval.tasks
import torch
from accelerate import Accelerator
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from safetensors import SafetensorError

from modeling_rwkv import doctor, generation
from rwkv_eval.harness import PREFIXES, RwkvLM, several_processes
from rwkv_eval.local_data import COLUMNS, GROUP, EvalError, check_answers, use_local_data
from rwkv_kernels.wkv4 import choose_backend

TASKS = Path(__file__).parent / "tasks"
SAMPLE = Path(__file__).parent / "sample"

# Where the harness keeps the paper's tasks: to index all of its folders takes seconds.
FOLDERS = ("arc", "headqa", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "super_glue", "winogrande")
REFUSALS = (EvalError, generation.GenerateError)
BOOTSTRAPS = 1000  # for standard errors that have no formula; 100,000 take minutes and change the third digit


def evaluate(
    model: str | None = None,
    tasks: Sequence[str] = (GROUP,),
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    peft: str | None = None,
    state: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | str = 16,
    prefix_token: str = "nothing",
    cache: str | Path | None = None,
    debug: bool = False,
) -> dict[str, Any] | None:
    """The harness's results, and under `rwkv` what they were measured on and with.

    Several processes of `accelerate launch` share the questions; all but the first return None.

    Args:
        model: folder or Hub id of an RWKV-4; None: the model in the box.
        tasks: names of the harness's tasks, groups or tags, `*` allowed; of the paper's too.
        data: folder of JSONL files instead of the Hub, see local_data.py; for the paper's tasks.
        limit: documents of each task; None: all of them.
        num_fewshot: examples before each question; None: what the task says.
        peft: folder or Hub id of an adapter; state: file of a state to begin with.
        batch_size, prefix_token: see `RwkvLM`.
        cache: existing folder to keep answers in until all are there, so that an interrupted run goes on.
        debug: let the harness and transformers say all that they have to say.

    Raises:
        EvalError: a task, a file of data or an argument that cannot be used; says what to do.
        GenerateError: the same of the model, its state or the device.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("cache", "debug")}
    if prefix_token not in PREFIXES:
        raise EvalError(f"prefix_token is {prefix_token!r}: choose one of {', '.join(PREFIXES)}")
    started = time.perf_counter()
    with _quiet(debug):
        manager = index(tasks)
        found, missing = find_tasks(manager, tasks, data, limit, num_fewshot)
        lm = load(model, peft, state, device, dtype, batch_size=batch_size, prefix_token=prefix_token)
        about = provenance(lm)
        answers = None if cache is None else str(Path(cache) / f"answers-{_fingerprint(lm, about)}")
        results: dict[str, Any] | None = lm_eval.simple_evaluate(
            lm,
            tasks=found,
            task_manager=manager,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            device=str(lm.device),
            limit=limit,
            use_cache=answers,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
        if answers is not None:
            Path(f"{answers}_rank{lm.rank}.db").unlink()
    if results is not None:
        seconds = round(time.perf_counter() - started, 1)
        results["rwkv"] = about | {"arguments": arguments, "skipped_tasks": missing, "seconds": seconds}
    return results


def index(names: Sequence[str]) -> TaskManager:
    """The harness's tasks and the paper's; of the former those that the paper has, if no other is named."""
    if set(names) <= {GROUP, *COLUMNS}:
        home = Path(lm_eval.tasks.__file__).parent
        return TaskManager(include_path=[*(home / folder for folder in FOLDERS), TASKS], include_defaults=False)
    return TaskManager(include_path=TASKS)


def find_tasks(
    manager: TaskManager,
    names: Sequence[str],
    data: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> tuple[list[ConfigurableTask | Group], list[str]]:
    """Tasks and groups with their documents, and which of the paper's have none in `data`; see `evaluate`.

    Raises:
        EvalError: an unknown task, data that cannot be had or read, fewer documents than asked for.
    """
    matched = [
        *dict.fromkeys(task for name in names for task in manager.match_tasks([name]) or _unknown(name, manager))
    ]
    missing = [] if data is None else use_local_data(manager, data)
    for name in matched if data is not None else ():
        if name != GROUP and (name not in COLUMNS or name in missing):
            raise EvalError(f"{data} has no {name}.jsonl: leave out {name}, or --data")
    try:
        loaded = manager.load(matched)
    except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cure = "check names and network, or give --data" if data is None else f"check names, and the rows in {data}"
        raise EvalError(f"{', '.join(names)} cannot be loaded ({reason}): {cure}") from error
    for name, task in loaded["tasks"].items():
        _check_size(name, task, limit, num_fewshot or 0)
        if data is not None:
            check_answers(task, limit)
    members = {name for names in loaded.get("group_map", {}).values() for name in names}
    every = loaded.get("groups", {}) | loaded["tasks"]
    return [task for name, task in every.items() if name not in members], missing if GROUP in matched else []


def load(model: str | None, peft: str | None, state: str | None, device: str, dtype: str, **options: Any) -> RwkvLM:
    """A model, with an adapter and a state if given, as the harness wants it; `options` are those of `RwkvLM`.

    Raises:
        GenerateError: no such model, device or state; EvalError: no such adapter, or one that does not fit.
    """
    place = Accelerator().device if several_processes() else generation.find_device(device)
    rwkv, tokenizer = generation.load(model, place, generation.find_dtype(dtype, place))
    if peft is not None:
        rwkv = _adapted(rwkv, peft)
    if state is not None:
        generation.begin_with(rwkv, state)
    return RwkvLM(rwkv, tokenizer=tokenizer, device=str(place), **options)


def table(results: dict[str, Any]) -> str:
    """Results as the harness prints them."""
    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join(tables)


def save(results: dict[str, Any], folder: str | Path) -> Path:
    """Write results as JSON into `folder`, under the model's name and the date; whole or not at all."""
    about = results["rwkv"]
    path = Path(folder) / f"{Path(about['model']).resolve().name}-{about['date'].replace(':', '')}.json"
    unfinished = path.with_name(path.name + ".unfinished")
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def provenance(lm: RwkvLM) -> dict[str, Any]:
    """What was run, and on what, in JSON's types."""
    found, dtype = doctor.examine(), str(lm.rwkv.dtype).removeprefix("torch.")
    names = {device["device"].partition(":")[0]: device["name"] for device in found["devices"]}
    packages = {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}
    return {
        "model": str(lm.rwkv.name_or_path),
        "parameters": lm.rwkv.num_parameters(),
        "dtype": dtype,
        "weights_sha256": sha256(lm.rwkv),
        "device": names.get(lm.device.type, str(lm.device)),
        "wkv": choose_backend(torch.empty(1, 2, 8, dtype=lm.rwkv.dtype, device=lm.device)),
        "prefix": lm.prefix,
        "versions": found["versions"] | packages,
        "platform": found["platform"],
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def sha256(model: torch.nn.Module) -> str:
    """Of names and bits of all parameters and buffers, in hexadecimal: the same however a checkpoint is cut."""
    digest = hashlib.sha256()
    for name, tensor in sorted(plain(model.state_dict()).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors by name; those of torchao's classes as the tensors that they are made of."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            found |= plain({f"{name}.{part}": getattr(tensor, part) for part in parts})
        else:
            found[name] = tensor
    return found


def _fingerprint(lm: RwkvLM, about: dict[str, Any]) -> str:
    """Of all that an answer depends on but its question."""
    adapters = getattr(lm.rwkv, "peft_config", {}).values()
    parts = [about[key] for key in ("weights_sha256", "dtype", "prefix")]
    parts += [lm.rwkv.config.to_dict(), lm.tokenizer.get_vocab(), *(adapter.to_dict() for adapter in adapters)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=sorted).encode()).hexdigest()[:16]


def _unknown(name: str, manager: TaskManager) -> list[str]:
    close = difflib.get_close_matches(name, [GROUP, *manager.all_tasks], n=1, cutoff=0)
    raise EvalError(f"there is no task {name!r}: did you mean {close[0]!r}? lm-eval ls tasks lists all of them")


def _check_size(name: str, task: ConfigurableTask, limit: int | None, num_fewshot: int) -> None:
    documents = len(task.eval_docs)
    if limit is not None and documents < limit:
        raise EvalError(f"limit is {limit} but {name} has {documents} documents: ask for no more")
    shared = task.config.fewshot_split is not None and task.config.fewshot_split == task.config.test_split
    examples = len(task.sampler.df) - shared
    if examples < num_fewshot:
        raise EvalError(f"num_fewshot is {num_fewshot} but {name} has {examples} examples: ask for no more")


def _adapted(model: torch.nn.Module, adapter: str) -> Any:
    """`model` with the layers of an adapter of PEFT in it."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvalError(f"peft is {adapter}, which is no adapter of this model ({reason}): give another") from error
    if adapted.active_peft_config.is_prompt_learning:
        raise EvalError(f"peft is {adapter}, which learned a prompt and no part of the model: use lm-eval --model hf")
    return adapted.get_base_model().eval()


def _commit() -> str | None:
    """The commit of this repository, if this file is in one; `+` if something has changed since."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(TASKS.parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return (git("rev-parse", "HEAD") or "") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Standard output left alone; the advice of libraries only if `debug`, and no processes for a second's work."""
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    bars = datasets.is_progress_bar_enabled()
    if not debug:
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
    try:
        with (
            generation.quiet(debug),
            redirect_stdout(sys.stderr),
            mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}),  # read by the harness's bootstrap
            mock.patch("lm_eval.evaluator.get_git_commit_hash", _commit, create=True),  # its own is of this folder
        ):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
