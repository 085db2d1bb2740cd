"""What the fine-tuning programs are tried on: a random model with a tokenizer, and rows of a few words."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from models import make

pytest.importorskip("datasets")

import datasets

from rwkv_finetune.tokenizer import train_tokenizer

WORDS = "the a cat dog king sun moon sat ran saw loved found under over with and then slowly one day"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def save_model(folder: Path, **sizes: int) -> Path:
    """Two layers, 20 channels unless ``sizes`` say otherwise."""
    shape = {"vocab_size": 300, "hidden_size": 20, "num_hidden_layers": 2} | sizes
    make(shape, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    train_tokenizer([WORDS] * 3, 300).save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
