"""The tokenizer and the chat template that are put beside converted weights."""

import json
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from modeling_rwkv.chat_templates import CHAT_TEMPLATES, ChatTemplate
from modeling_rwkv.checkpoint_files import CheckpointError, load_json
from modeling_rwkv.configuration_rwkv import RwkvConfig
from modeling_rwkv.tokenization_rwkv import RwkvTokenizer

CHAT_FILE = "chat_template.jinja"


def find_stop_strings(
    tokenizer: str | PathLike[str] | None, vocab: str | PathLike[str] | None, chat: str | None
) -> list[str] | str | None:
    """Where generation ends: before what belongs to the chat template that `tokenizer_files` writes."""
    if template := _find_chat_template(chat, tokenizer, vocab):
        return list(template.stop_strings)
    path = Path(tokenizer or "") / "generation_config.json"
    if tokenizer is None or chat is not None or not path.exists() or not path.with_name(CHAT_FILE).exists():
        return None
    return load_json(path).get("stop_strings")


def tokenizer_files(
    tokenizer: str | PathLike[str] | None,
    vocab: str | PathLike[str] | None,
    chat: str | None,
    config: RwkvConfig,
) -> dict[str, bytes]:
    """The files to put beside the weights, by name, so that AutoTokenizer loads a fast tokenizer; none if neither.

    Args:
        tokenizer: a `tokenizer.json`, or a folder with one.
        vocab: a World model's vocabulary file, or "world" for that of the installed `rwkv` package.
        chat: name of a chat template, or "none"; None is World's for a `vocab`, and keeps that of a folder.

    Raises:
        CheckpointError: both tokenizers are given, or one that is missing, unreadable or larger than the model's
            embedding; a chat template that there is not.
    """
    template = _find_chat_template(chat, tokenizer, vocab)
    if tokenizer is not None and vocab is not None:
        raise CheckpointError(f"both a tokenizer ({tokenizer}) and a vocabulary ({vocab}) are given; leave one out")
    if vocab is not None:
        files = _world_files(None if vocab == "world" else Path(vocab), config)
    else:
        files = {} if tokenizer is None else _json_files(Path(tokenizer), config, keep_chat=chat is None)
    return files if template is None else files | {CHAT_FILE: template.text.encode()}


def _find_chat_template(
    name: str | None, tokenizer: str | PathLike[str] | None, vocab: str | PathLike[str] | None
) -> ChatTemplate | None:
    """The chat template that is asked for: a name in CHAT_TEMPLATES, "none", or (None) World's for a `vocab`.

    Raises:
        CheckpointError: no such template, or no tokenizer to put it beside.
    """
    if name not in (None, "none", *CHAT_TEMPLATES):
        raise CheckpointError(f"chat is {name!r}; choose {', '.join(CHAT_TEMPLATES)} or none")
    if name is not None and tokenizer is None and vocab is None:
        raise CheckpointError(f"chat is {name!r}, but a chat template belongs to a tokenizer; give that too")
    if name is None and vocab is not None:
        name = "world"
    return None if name is None else CHAT_TEMPLATES.get(name)


def _json_files(path: Path, config: RwkvConfig, keep_chat: bool) -> dict[str, bytes]:
    """A folder's own settings are kept. Otherwise the special token with id 0, with which RWKV-4
    models end a document, becomes bos, eos and unk, and there is no pad token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give a tokenizer.json or a folder with one")
    data = file.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except ValueError as error:
        raise CheckpointError(f"{file} is not a tokenizer.json ({error}); save it again") from error
    _check_size(file, tokenizer, config)
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
        if not keep_chat:
            settings.pop("chat_template", None)  # where older versions of transformers put it
        for name in ("special_tokens_map.json", *[CHAT_FILE] * keep_chat):
            if (path / name).exists():
                files[name] = (path / name).read_bytes()
    # A class such as GPTNeoXTokenizer would rebuild its own pre-tokenizer and add a pad token.
    if settings.get("tokenizer_class") != RwkvTokenizer.__name__:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("auto_map", None)
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    return files


def _world_files(vocab: Path | None, config: RwkvConfig) -> dict[str, bytes]:
    if vocab is not None and not vocab.is_file():
        raise CheckpointError(f"{vocab} does not exist; give a vocabulary file, or world for that of the rwkv package")
    try:
        tokenizer = RwkvTokenizer(vocab, model_max_length=config.context_length)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    _check_size(vocab or "the World vocabulary", tokenizer.backend_tokenizer, config)
    with TemporaryDirectory() as folder:
        return {Path(file).name: Path(file).read_bytes() for file in tokenizer.save_pretrained(folder)}


def _check_size(source: Path | str, tokenizer: Tokenizer, config: RwkvConfig) -> None:
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > config.vocab_size:
        raise CheckpointError(
            f"{source} has {size} tokens but the model's embedding has {config.vocab_size}; "
            "give the tokenizer that this model was trained with"
        )
