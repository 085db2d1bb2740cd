"""Reading a text file as documents: the unit of packing, of measuring, and of memory.

The file is UTF-8. Documents are separated by a line that holds `<|endoftext|>` and nothing else;
a separator at the end of the file is optional. The newline that ends the last line of a document
belongs to the separator, everything else is the document's text, byte for byte. Documents
without a single visible character are dropped.
"""

from collections.abc import Iterator
from pathlib import Path

SEPARATOR = "<|endoftext|>"


def read_documents(path: str | Path) -> Iterator[str]:
    """Yield the documents of the file at `path`, one by one, in order.

    Raises:
        ValueError: there is no such file, it is not UTF-8, or it holds no document.
    """
    found = False
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            lines: list[str] = []
            for line in file:
                if line.removesuffix("\n") != SEPARATOR:
                    lines.append(line)
                    continue
                if text := _text(lines):
                    found = True
                    yield text
                lines = []
            if text := _text(lines):
                found = True
                yield text
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    if not found:
        raise ValueError(f"{path} holds no document; is it the right file?")


def _text(lines: list[str]) -> str:
    text = "".join(lines).removesuffix("\n")
    return text if text.strip() else ""


def byte_count(documents: list[str]) -> int:
    """UTF-8 bytes of all the texts: what "per byte" means everywhere in this project."""
    return sum(len(text.encode("utf-8")) for text in documents)
