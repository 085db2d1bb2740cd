"""ReCoRD as the harness asks it: which entity of a passage belongs into the gap of a query? Scored by exact match."""

import re
import string
from typing import Any

from datasets import Dataset

Doc = dict[str, Any]


def unique(documents: Dataset) -> Dataset:
    """Entities and answers, each once and sorted."""
    return documents.map(lambda doc: {name: sorted(set(doc[name])) for name in ("entities", "answers")})


def context(doc: Doc) -> str:
    """The passage, and its highlights as a list."""
    passage, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return passage + "\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def choices(doc: Doc) -> list[str]:
    """The query as the last item of that list, with each entity."""
    return [_filled(doc, entity) for entity in doc["entities"]]


def answer(doc: Doc) -> str:
    """The query with the first answer."""
    return _filled(doc, doc["answers"][0])


def exact_match(doc: Doc, results: list[tuple[float, bool]]) -> dict[str, bool]:
    """Whether the likeliest entity is an answer, up to case, punctuation and articles."""
    likeliest = max(range(len(results)), key=lambda i: results[i][0])
    return {"em": _bare(doc["entities"][likeliest]) in map(_bare, doc["answers"])}


def _filled(doc: Doc, entity: str) -> str:
    return "  - " + doc["query"].replace("@placeholder", entity)


def _bare(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
