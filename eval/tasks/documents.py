"""The documents of a text file as the harness wants them."""

from typing import Any

from datasets import Dataset

from rwkv_eval.documents import read_documents


def read(file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """One row for each document of `file`, see rwkv_eval/documents.py; other keys of the metadata are ignored.

    Raises:
        ValueError: there is no such file, it is not UTF-8, or it holds no document.
    """
    if file is None:
        raise ValueError("""rwkv_perplexity reads a file: give --metadata '{"file": "valid.txt"}'""")
    return {"test": Dataset.from_dict({"text": list(read_documents(file))})}
