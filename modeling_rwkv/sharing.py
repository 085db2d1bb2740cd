"""Folders for programs that never heard of this package: with trust_remote_code=True they use it, else what they have.

Such a folder has an `auto_map`, by which transformers finds code beside the weights, and use_modeling_rwkv.py, which
imports this package or says how to install it. Once it has them, it keeps them: what is loaded from it is saved so.
"""

import json
import os
from pathlib import Path
from typing import Any

HUB_FILE = "use_modeling_rwkv.py"
_MODULE = HUB_FILE.removesuffix(".py")
CONFIG_FIELDS: dict[str, Any] = {
    # Some programs (TRL, transformers serve) load the class of transformers that has this name. Its RwkvForCausalLM
    # is another model; this one follows the auto_map.
    "architectures": ["AutoModelForCausalLM"],
    "auto_map": {
        "AutoConfig": f"{_MODULE}.RwkvConfig",
        "AutoModel": f"{_MODULE}.RwkvModel",
        "AutoModelForCausalLM": f"{_MODULE}.RwkvForCausalLM",
    },
}
TOKENIZER_FIELDS: dict[str, Any] = {"auto_map": {"AutoTokenizer": [None, f"{_MODULE}.RwkvTokenizer"]}}


def share(folder: str | os.PathLike[str]) -> list[Path]:
    """Let every program use the RWKV-4 in ``folder``, and describe it; returns the files that were written or changed.

    To config.json, to the tokenizer_config.json of a World tokenizer and to the head of a README.md only what is
    missing is added (an `auto_map` that leads elsewhere leads here from now on); a README.md that is not there is
    made, see :func:`modeling_rwkv.model_card.model_card`.

    Raises:
        ValueError: ``folder`` has no config.json of an RWKV-4, or a file that cannot be read; nothing has changed.
    """
    from modeling_rwkv.model_card import model_card  # which knows the model, which knows this

    folder = Path(folder)
    config = _read(folder / "config.json")
    if (found := config.get("model_type")) != "rwkv":
        raise ValueError(f"{folder} holds a model of type {found!r}, not 'rwkv'; give the folder of an RWKV-4")
    contents = {"config.json": _json(config, CONFIG_FIELDS)}
    if (folder / "tokenizer_config.json").exists():
        settings = _read(folder / "tokenizer_config.json")
        if settings.get("tokenizer_class") == "RwkvTokenizer":
            contents["tokenizer_config.json"] = _json(settings, TOKENIZER_FIELDS)
    if (card := model_card(folder)) is not None:
        contents["README.md"] = card
    return [copy_hub_file(folder), *(_write(folder / name, content) for name, content in contents.items())]


def is_shared(auto_map: Any) -> bool:
    """Whether this `auto_map`, if it is one, leads here, perhaps by way of a repository on the Hub."""
    return f"{_MODULE}." in str(auto_map)


def copy_hub_file(folder: str | os.PathLike[str]) -> Path:
    """Put use_modeling_rwkv.py in ``folder``, which is made if it is not there."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return _write(Path(folder) / HUB_FILE, Path(__file__).with_name(HUB_FILE).read_bytes())


class UploadsHubFile:
    """For classes of transformers whose `save_pretrained` uploads the files that changed since it began.

    use_modeling_rwkv.py, which is put there before that, is always among them.
    """

    def _get_files_timestamps(self, working_dir: str | os.PathLike[str]) -> dict[str, float]:
        timestamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: time for name, time in timestamps.items() if name != HUB_FILE}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or is not JSON ({error}); give the folder of a model") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object; get the file again")
    return content


def _json(content: dict[str, Any], fields: dict[str, Any]) -> bytes:
    """``content`` with ``fields``; entries of its `auto_map` for other classes stay."""
    others = content.get("auto_map")
    if isinstance(others, dict):
        fields = fields | {"auto_map": others | fields["auto_map"]}
    return (json.dumps(content | fields, indent=2, ensure_ascii=False) + "\n").encode()


def _write(path: Path, content: bytes) -> Path:
    """Whole or not at all. A link, such as those of the Hub's cache, is replaced; what it leads to stays as it is."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
    return path
