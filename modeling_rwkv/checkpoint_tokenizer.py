"""The tokenizer that is put beside converted weights."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modeling_rwkv.checkpoint_files import CheckpointError, load_json
from modeling_rwkv.configuration_rwkv import RwkvConfig


def tokenizer_files(path: Path, config: RwkvConfig) -> dict[str, bytes]:
    """The files to put beside the weights, by name, so that AutoTokenizer loads a fast tokenizer.

    A folder's own settings are kept. Otherwise the special token with id 0, with which RWKV-4
    models end a document, becomes bos, eos and unk, and there is no pad token.

    Raises:
        CheckpointError: no `tokenizer.json`, or one with more tokens than the model's embedding.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give a tokenizer.json or a folder with one")
    data = file.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except ValueError as error:
        raise CheckpointError(f"{file} is not a tokenizer.json ({error}); save it again") from error
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > config.vocab_size:
        raise CheckpointError(
            f"{file} has {size} tokens but the model's embedding has {config.vocab_size}; "
            "give the tokenizer that this model was trained with"
        )
    settings: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length,
    }
    end_of_document = tokenizer.get_added_tokens_decoder().get(0)
    if end_of_document is not None and end_of_document.special:
        for role in ("bos_token", "eos_token", "unk_token"):
            settings[role] = end_of_document.content
    files = {"tokenizer.json": data}
    if path.is_dir():
        if (path / "tokenizer_config.json").exists():
            settings.update(load_json(path / "tokenizer_config.json"))
        for name in ("special_tokens_map.json", "chat_template.jinja"):
            if (path / name).exists():
                files[name] = (path / name).read_bytes()
    # A class such as GPTNeoXTokenizer would rebuild its own pre-tokenizer and add a pad token.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("auto_map", None)
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    return files
