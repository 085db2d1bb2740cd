"""Rows of a file, a folder or a data set of the Hub, through `datasets`, and where each of them stands.

    JSONL, JSON (an array), CSV, Parquet      a row each
    .txt                                      documents between lines `<|endoftext|>`, as rows `text`
    a folder                                  of such files, or what `save_to_disk` wrote
    anything else                             an id of the Hub

Cells of a CSV are text, whatever they look like, and every row has as many as the header.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import datasets
import pyarrow.parquet  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from rwkv_eval.documents import read_documents
from rwkv_finetune.arguments import Refusal

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
UNREADABLE = (DatasetGenerationError, pyarrow.ArrowException, csv.Error, UnicodeDecodeError, StopIteration)


@dataclass(frozen=True)
class Source:
    """Rows by column name, and what to call them when one is wrong."""

    name: str
    rows: Rows

    @property
    def columns(self) -> list[str]:
        """Names of the columns; a stream that does not know them is asked for its first row."""
        return self.rows.column_names or list(next(iter(self.rows), {}))

    def place(self, index: int) -> str:
        """Of the row `index`, from 0: `train.jsonl, row 3 (line 4)`."""
        place = f"{self.name}, row {index + 1}"
        if Path(self.name).suffix == ".jsonl" and Path(self.name).is_file():
            with open(self.name, encoding="utf-8") as file:
                filled = (number for number, line in enumerate(file, 1) if line.strip())
                place += f" (line {next(number for n, number in enumerate(filled) if n == index)})"
        return place


def open_source(name: str, split: str = "train", subset: str | None = None, streaming: bool = False) -> Source:
    """The rows of `name`; `split` and `subset` choose among those of a folder or of a data set of the Hub.

    Raises:
        Refusal: nothing of that name, of a format that is not known, or of what a file promised; no rows.
    """
    path = Path(name)
    if not path.exists() and (path.suffix in BUILDERS or path.is_absolute() or name.count("/") != 1):
        raise Refusal(f"there is no file or folder {name}; check the path")
    if path.is_file() and path.suffix not in BUILDERS:
        raise Refusal(f"{name} ends in {path.suffix or 'nothing'}; known are {', '.join(BUILDERS)}")
    try:
        rows = _load(path, name, split, subset, streaming)
        if next(iter(rows), None) is None:
            raise Refusal(f"{name} holds no rows; is it the right file?")
    except (DatasetNotFoundError, ConnectionError) as error:
        raise Refusal(f"there is no file, folder or data set of the Hub {name}, or the Hub is out of reach") from error
    except (*UNREADABLE, ValueError, OSError) as error:
        raise unreadable(name, error) from error
    return Source(name, rows)


def _load(path: Path, name: str, split: str, subset: str | None, streaming: bool) -> Rows:
    if path.is_dir() and (path / "state.json").exists():
        return datasets.load_from_disk(name)
    if not path.is_file():
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    builder = BUILDERS[path.suffix]
    if builder in OWN:
        rows = datasets.IterableDataset.from_generator(OWN[builder], gen_kwargs={"path": name})
        return rows if streaming else datasets.Dataset.from_list(list(rows))
    if builder == "parquet" and not pyarrow.parquet.read_metadata(path).num_rows:
        raise Refusal(f"{name} holds no rows; is it the right file?")
    return datasets.load_dataset(builder, data_files=name, split="train", streaming=streaming)


def _documents(path: str) -> Iterator[dict[str, str]]:
    for text in read_documents(path):
        yield {"text": text}


def _cells(path: str) -> Iterator[dict[str, str]]:
    """What `datasets` would fill up with empty text, and read as a number, is refused, and is text."""
    csv.field_size_limit(2**31 - 1)  # of all readers, and 128 KiB otherwise
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        for row in filter(None, rows):
            if len(row) != len(header):
                raise Refusal(f"{path}, line {rows.line_num}: expected {len(header)} cells, there are {len(row)}")
            yield dict(zip(header, row, strict=True))


OWN = {"text": _documents, "csv": _cells}


def unreadable(name: str, error: BaseException) -> Refusal:
    """Why `name` could not be read: for JSONL the line, where `datasets` names a place in a block."""
    if Path(name).suffix == ".jsonl" and Path(name).is_file():
        kinds: dict[str, type] = {}
        with open(name, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and (wrong := _wrong(line, kinds)):
                    return Refusal(f"{name}, line {number}: {wrong}")
    if "corresponds to no data" in str(error) or (Path(name).is_file() and not Path(name).stat().st_size):
        return Refusal(f"{name} holds no rows; is it the right file?")
    return Refusal(f"cannot read {name}: {error.__cause__ or error}")


def _wrong(line: bytes, kinds: dict[str, type]) -> str | None:
    """What keeps a line from being an object of the columns so far, `kinds` by name, which it adds to."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error}); every line must hold one object"
    if not isinstance(row, dict):
        return f"expected an object, there is {json.dumps(row)[:40]}"
    for column, value in row.items():
        if value is not None and kinds.setdefault(column, type(value)) is not type(value):
            return f"column {column!r}: expected {kinds[column].__name__} as before, there is {json.dumps(value)[:40]}"
    return None
