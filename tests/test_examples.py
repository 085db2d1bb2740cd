"""Laws of supervised examples: which tokens are read, which are learned, and what is refused before training."""

import copy
import csv
import json
import logging
import random
from pathlib import Path

import pytest
import torch
from models import agree, gradients, make

pytest.importorskip("datasets")

import datasets

from rwkv_finetune.arguments import Refusal
from rwkv_finetune.data import DataArguments, load_data
from rwkv_finetune.packing import IGNORED
from rwkv_finetune.tokenizer import train_tokenizer

WORDS = "the a cat dog king sun moon sat ran saw loved found under over with and then slowly one day"
END = 0
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS] * 3, 300)


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randrange(1, most)))


def prompts(count: int = 23, seed: int = 0) -> list[dict[str, str]]:
    """Rows of prompt and completion; the numbers make them different and look like no text to a CSV reader."""
    rng = random.Random(seed)
    return [{"prompt": f"{i} {words(rng, 9)}:", "completion": f"{i}" if i % 5 else "NA"} for i in range(count)]


def write(folder: Path, rows: list, name: str = "train.jsonl") -> str:
    """The rows as a file of the kind that its name says."""
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".txt":
        path.write_text("\n<|endoftext|>\n".join(row["text"] for row in rows))
    return str(path)


def load(file: str, tokenizer, seed: int = 0, **options):
    return load_data(
        DataArguments(**{"train_file": file, "context_length": 64, "packing": False} | options), tokenizer, seed
    )


def pairs(rows) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of rows without packing."""
    return [(list(map(int, row["input_ids"])), list(map(int, row["labels"]))) for row in rows]


def expected(tokenizer, *segments: tuple[str, bool]) -> tuple[list[int], list[int]]:
    """Segments tokenised one by one, an end after each that is learned."""
    tokens, labels = [], []
    for text, learned in segments:
        ids = tokenizer(text)["input_ids"] + [END] * learned
        tokens += ids
        labels += ids if learned else [IGNORED] * len(ids)
    return tokens, [IGNORED, *labels[1:]]


# Formats


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "saved", "stream"])
def test_every_kind_of_file_gives_the_same_examples(kind, tokenizer, tmp_path):
    rows = prompts()
    options = {}
    if kind == "folder":
        (tmp_path / "data").mkdir()
        write(tmp_path / "data", rows, "train.parquet")
        file = str(tmp_path / "data")
    elif kind == "saved":
        file = str(tmp_path / "saved")
        datasets.Dataset.from_list(rows).save_to_disk(file)
    else:
        options = {"streaming": kind == "stream"}
        file = write(tmp_path, rows, f"train.{'jsonl' if kind == 'stream' else kind}")
    found = load(file, tokenizer, **options).train
    found = pairs(found.take(len(rows)) if kind == "stream" else found)
    wanted = [expected(tokenizer, (row["prompt"], False), (row["completion"], True)) for row in rows]
    assert sorted(found) == sorted(wanted)
    if kind != "stream":
        assert found == wanted


CHAT = [
    {"role": "system", "content": "the king"},
    {"role": "user", "content": "a cat"},
    {"role": "assistant", "content": "sat <|endoftext|>"},
    {"role": "user", "content": "one day"},
    {"role": "assistant", "content": "ran"},
    {"role": "user", "content": "and then"},
]


@pytest.mark.parametrize(
    ("row", "segments"),
    [
        ({"text": "the cat"}, [("the cat", True)]),
        ({"prompt": "the", "completion": " cat"}, [("the", False), (" cat", True)]),
        (
            {"instruction": "the cat", "input": "sat", "output": "one day"},
            [("Instruction: the cat\n\nInput: sat\n\nResponse:", False), (" one day", True)],
        ),
        (
            {"instruction": "the cat", "input": " ", "output": "", "text": "all of it"},
            [("Instruction: the cat\n\nResponse:", False), (" ", True)],
        ),
        (
            {"instruction": "the cat", "input": None, "output": "ran"},
            [("Instruction: the cat\n\nResponse:", False), (" ran", True)],
        ),
        ({"instruction": "cat", "output": "ran"}, [("Instruction: cat\n\nResponse:", False), (" ran", True)]),
        (
            {"messages": CHAT, "prompt": "the", "completion": "cat"},
            [
                ("System: the king\n\nUser: a cat\n\nAssistant:", False),
                (" sat <|endoftext|>\n\n", True),
                ("User: one day\n\nAssistant:", False),
                (" ran\n\n", True),
            ],
        ),
        (
            {"messages": [{"role": "assistant", "content": "the"}, *CHAT[1:3]]},
            [("Assistant: the\n\nUser: a cat\n\nAssistant:", False), (" sat <|endoftext|>\n\n", True)],
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_learned_and_prompts_are_not(row, segments, stream, tokenizer, tmp_path):
    file = write(tmp_path, [row])
    found = load(file, tokenizer, streaming=stream, context_length=200).train
    spelt = [(tokenizer(text, split_special_tokens=True)["input_ids"], learned) for text, learned in segments]
    tokens = [t for ids, learned in spelt for t in ids + [END] * learned]
    labels = [t if learned else IGNORED for ids, learned in spelt for t in ids + [END] * learned]
    assert pairs(found.take(1) if stream else found) == [(tokens, [IGNORED, *labels[1:]])]


@pytest.mark.parametrize("ends", [True, False])
def test_a_chat_template_says_what_generation_will_see(ends, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE if ends else TEMPLATE.replace("<|endoftext|>", "")
    ((tokens, labels),) = pairs(load(write(tmp_path, [{"messages": CHAT}]), tokenizer, context_length=200).train)
    first = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    assert tokens[: len(first)] == first and set(labels[: len(first)]) == {IGNORED}
    answers = tokenizer.decode([label for label in labels if label != IGNORED])
    assert answers == (
        "sat <|endoftext|><|endoftext|>ran<|endoftext|>" if ends else "sat <|endoftext|>ran<|endoftext|>"
    )
    conversation = tokenizer.apply_chat_template(CHAT[:5], tokenize=False)
    assert tokenizer.decode(tokens) == conversation + "<|endoftext|>" * (not ends)


def test_columns_may_have_other_names(tokenizer, tmp_path):
    row = {"q": "the cat", "a": "ran", "ctx": "one day", "text": "all"}
    file = write(tmp_path, [row])
    answered = load(file, tokenizer, columns=["prompt=q", "completion=a"]).train
    assert pairs(answered) == [expected(tokenizer, ("the cat", False), ("ran", True))]
    instructed = load(file, tokenizer, columns=["instruction=q", "input=ctx", "output=a"]).train
    prompt = "Instruction: the cat\n\nInput: one day\n\nResponse:"
    assert pairs(instructed) == [expected(tokenizer, (prompt, False), (" ran", True))]
    assert pairs(load(file, tokenizer, columns=["text=ctx"]).train) == [expected(tokenizer, ("one day", True))]


def test_documents_of_a_text_file_go_on_in_the_next_row(tokenizer, tmp_path):
    rng = random.Random(3)
    documents = [{"text": words(rng, 80)} for _ in range(9)]
    rows = pairs(load(write(tmp_path, documents, "train.txt"), tokenizer, context_length=17).train)
    for tokens, labels in rows:
        assert 2 <= len(tokens) <= 17 and labels == [IGNORED, *tokens[1:]]
    learned = sum(len(tokens) - 1 for tokens, _ in rows)
    assert learned == sum(len(tokenizer(d["text"])["input_ids"]) for d in documents)


# Lengths


@pytest.mark.parametrize("context_length", [2, 3, 9, 21])
def test_long_answers_lose_their_ends_and_are_counted_once(context_length, tokenizer, tmp_path, caplog):
    rows = prompts(40)
    whole = [expected(tokenizer, (row["prompt"], False), (row["completion"], True)) for row in rows]
    cut = [(tokens[:context_length], labels[:context_length]) for tokens, labels in whole]
    kept = [(tokens, labels) for tokens, labels in cut if set(labels) != {IGNORED}]
    shortened = sum(len(tokens) > context_length for tokens, _ in whole)
    file = write(tmp_path, rows)
    with caplog.at_level(logging.WARNING):
        if not kept:
            with pytest.raises(Refusal, match="nothing to learn"):
                load(file, tokenizer, context_length=context_length)
            return
        data = load(file, tokenizer, context_length=context_length)
        data.warn()
    assert pairs(data.train) == kept
    (warning,) = caplog.messages
    assert f"{shortened} examples" in warning and f"{len(rows) - len(kept)} had nothing" in warning


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_share_is_held_out_and_nothing_is_lost(share, tokenizer, tmp_path):
    rows = prompts()
    file = write(tmp_path, rows)
    data = load(file, tokenizer, validation_share=share)
    assert len(data.validation) == round(len(rows) * share)
    assert sorted(pairs(data.train) + pairs(data.validation)) == sorted(pairs(load(file, tokenizer).train))
    again = load(file, tokenizer, validation_share=share)
    assert pairs(again.validation) == pairs(data.validation)


# Packing


@pytest.mark.parametrize("packing", [True, False])
def test_rows_have_the_gradients_of_their_examples_alone(packing, tokenizer, tmp_path):
    """Packed end to end, or padded by the collator: one loss, one gradient."""
    rng = random.Random(5)
    rows = [{"prompt": words(rng, 9), "completion": words(rng, 6)} for _ in range(11)]
    data = load(write(tmp_path, rows), tokenizer, packing=packing)
    model = make({"vocab_size": 300, "hidden_size": 20, "num_hidden_layers": 2})
    batch = data.collate([data.train[i] for i in range(len(data.train))])
    assert packing == (len(data.train) < len(rows))
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    found = gradients(model)
    total = torch.zeros(())
    for row in rows:
        tokens, labels = expected(tokenizer, (row["prompt"], False), (row["completion"], True))
        total = total + model(torch.tensor([tokens]), labels=torch.tensor([labels]), num_items_in_batch=1).loss
    total.backward()
    agree(loss, total, rtol=1e-5)
    agree(found, gradients(model), rtol=1e-3)


# Streams


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_repeats_itself_and_goes_on_for_ever(packing, tokenizer, tmp_path):
    file = write(tmp_path, prompts())
    once = load(file, tokenizer, packing=packing).train
    stream = load(file, tokenizer, packing=packing, streaming=True, seed=3).train
    rows = list(stream.take(3 * len(once)))
    assert len(rows) == 3 * len(once)
    assert list(load(file, tokenizer, packing=packing, streaming=True, seed=3).train.take(len(rows))) == rows
    tokens = sorted(int(t) for row in once for t in row["input_ids"])
    for start in range(0, len(rows), len(once)):
        assert sorted(t for row in rows[start : start + len(once)] for t in row["input_ids"]) == tokens


# Refusals

GOOD = {"prompt": "the", "completion": "cat"}
REFUSED = {
    "empty": ("train.jsonl", "", ["train.jsonl", "no rows"]),
    "empty array": ("train.json", "[]", ["train.json", "no rows"]),
    "header alone": ("train.csv", "prompt,completion\n", ["train.csv", "no rows"]),
    "a cell too few": ("train.csv", 'prompt,completion\n"a\nb",c\nthe\n', ["train.csv", "line 4", "2 cells", "1"]),
    "a cell too many": ("train.csv", "prompt,completion\nthe,cat,sat\n", ["train.csv", "line 2", "2 cells", "3"]),
    "an open quote": ("train.csv", 'prompt,completion\nthe,"cat\n', ["train.csv", "end of data"]),
    "no documents": ("train.txt", "\n", ["train.txt", "no document"]),
    "unknown format": ("train.xlsx", "x", [".xlsx", ".jsonl"]),
    "broken line": ("train.jsonl", f'{json.dumps(GOOD)}\n\n{{"prompt": "a",\n', ["line 3", "not JSON"]),
    "a list": ("train.jsonl", f"{json.dumps(GOOD)}\n[1]\n", ["line 2", "object", "[1]"]),
    "a number": (
        "train.jsonl",
        f'{json.dumps(GOOD)}\n\n{{"prompt": "a", "completion": 3}}\n',
        ["line 3", "completion", "3"],
    ),
    "null": ("train.jsonl", f'{json.dumps(GOOD)}\n\n{{"prompt": "a"}}\n', ["row 2", "line 3", "'completion'", "null"]),
    "null in an array": ("train.json", f'[{json.dumps(GOOD)}, {{"prompt": "a"}}]', ["row 2", "'completion'", "null"]),
    "broken array": ("train.json", f"[{json.dumps(GOOD)}", ["train.json"]),
    "columns": ("train.jsonl", '{"q": "a"}\n', ["q", "prompt, completion", "--columns"]),
    "no list": ("train.jsonl", '{"messages": "a"}\n', ["row 1", "'messages'", "list", '"a"']),
    "no messages": ("train.jsonl", '{"messages": ["a"]}\n', ["row 1", "role and content", '"a"']),
    "no content": ("train.jsonl", '{"messages": [{"role": "user"}]}\n', ["row 1", "role and content"]),
    "no answer": ("train.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', ["row 1", "assistant"]),
    "a greeting alone": (
        "train.jsonl",
        '{"messages": [{"role": "assistant", "content": "a"}]}\n',
        ["nothing to learn"],
    ),
    "role": (
        "train.jsonl",
        '{"messages": [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        ["row 1", '"bot"', "user"],
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_is_refused_where_it_stands(case, stream, tokenizer, tmp_path):
    name, content, said = REFUSED[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(Refusal) as refusal:
        load(str(tmp_path / name), tokenizer, streaming=stream)
    for word in said:
        assert word in str(refusal.value), refusal.value


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ messages.x.y }}", {"other": "x"}])
def test_a_template_that_fails_is_refused_where_it_does(template, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(Refusal, match=r"row 1.*the chat template refuses the messages"):
        load(write(tmp_path, [{"messages": CHAT}]), tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_table_without_rows_is_refused(stream, tokenizer, tmp_path):
    datasets.Dataset.from_list([GOOD]).select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(Refusal, match=r"train\.parquet holds no rows"):
        load(str(tmp_path / "train.parquet"), tokenizer, streaming=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cell_may_be_long_or_hold_nothing(stream, tokenizer, tmp_path):
    rows = [{"prompt": "the cat " * 20_000, "completion": "ran"}, {"prompt": "", "completion": "sat"}]
    found = load(write(tmp_path, rows, "train.csv"), tokenizer, streaming=stream, context_length=10**6).train
    wanted = [expected(tokenizer, (row["prompt"], False), (row["completion"], True)) for row in rows]
    assert sorted(pairs(found.take(2) if stream else found)) == sorted(wanted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_file": "missing.jsonl"}, "missing.jsonl"),
        ({"train_file": "/no/where"}, "/no/where"),
        ({"train_file": "owner/nothing"}, "Hub"),
        ({"columns": ["prompt=question"]}, "question"),
        ({"columns": ["promt=prompt"]}, "promt"),
        ({"validation_share": 0.001}, "validation_share"),
        ({"validation_file": "missing.csv"}, "missing.csv"),
    ],
)
def test_options_that_fit_nothing_are_refused(options, said, tokenizer, tmp_path):
    with pytest.raises(Refusal, match=said):
        load(
            **{"file": write(tmp_path, prompts()), "tokenizer": tokenizer}
            | {"file" if k == "train_file" else k: v for k, v in options.items()}
        )
