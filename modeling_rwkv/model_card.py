"""Model cards: a README.md that says what the files beside it say."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers import GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template
from yaml import YAMLError, safe_load

from modeling_rwkv.chat_templates import CHAT_TEMPLATES
from modeling_rwkv.configuration_rwkv import RwkvConfig
from modeling_rwkv.modeling_rwkv import RwkvForCausalLM

SIZES = ("num_hidden_layers", "hidden_size", "attention_hidden_size", "intermediate_size", "vocab_size")
HEAD = {  # what a card needs in its head for the Hub to show how the model is used
    "library_name": "library_name: transformers",
    "pipeline_tag": "pipeline_tag: text-generation",
    "tags": "tags: [rwkv]",
}
CONVERSATION = [
    {"role": "user", "content": "What does the fox eat?"},
    {"role": "assistant", "content": "Red berries, every day."},
    {"role": "user", "content": "Why?"},
]


def model_card(folder: Path) -> bytes | None:
    """The README.md of ``folder``, written from the files there; or the one that is there, with what its head lacks.

    Nothing else of a card that is there is changed. The licence is for the author to state. None: it lacks nothing.

    Raises:
        ValueError: the card that is there is not UTF-8, or its head is not YAML of one field a line.
    """
    path = folder / "README.md"
    if not path.exists():
        return _completed(_text(folder)).encode()
    try:
        old = path.read_bytes().decode("utf-8-sig")
        new = _completed(old)
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"{path} is not UTF-8, or its head is not YAML of one field a line ({error}); mend it, or remove the file"
        ) from error
    return None if new == old else new.encode()


def _completed(card: str) -> str:
    """With the fields of HEAD that its own head, if there is one, does not have."""
    end = "\r\n" if "\r\n" in card else "\n"
    found = REGEX_YAML_BLOCK.search(card)
    if found is None:
        lines = ["---", *HEAD.values(), "---", "", card]
        return end.join(lines)
    data = _parsed(found[2])
    head = end.join([found[2], *(lines for name, lines in HEAD.items() if name not in data)])
    if _parsed(head).keys() != data.keys() | HEAD.keys():
        raise ValueError("nothing can be added to it")
    return card[: found.start(2)] + head + card[found.end(2) :]


def _parsed(head: str) -> dict[str, Any]:
    data = safe_load(head) or {}
    if not isinstance(data, dict):
        raise ValueError(f"it is a {type(data).__name__}")
    return data


def _text(folder: Path) -> str:
    config = RwkvConfig.from_pretrained(folder)
    name = folder.resolve().name
    parts = [f"# {name}", _sizes(config), _use(name)]
    if (folder / "chat_template.jinja").exists():
        parts.append(_chat(folder))
    parts.append("## Licence and training data\n\nFor the author to state: here, and as `license:` above.")
    return "\n\n".join(parts) + "\n"


def _sizes(config: RwkvConfig) -> str:
    with torch.device("meta"):
        parameters = RwkvForCausalLM(config).num_parameters()
    rows = [("parameters", f"{parameters:,}")]
    rows += [(name.replace("num_hidden_", "").replace("_", " "), f"{getattr(config, name):,}") for name in SIZES]
    rows.append(("length of texts in training, tokens", f"{config.context_length:,}"))
    if config.dtype is not None:
        rows.append(("weights", str(config.dtype).removeprefix("torch.")))
    if config.initial_state:
        rows.append(("begins with", "a learned state"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    paper = "[Peng et al. 2023](https://arxiv.org/abs/2305.13048)"
    return f"An RWKV-4 language model ({paper}).\n\n| | |\n| --- | --- |\n{table}"


def _use(name: str) -> str:
    return f"""## Use

`pip install modeling-rwkv`, then

```python
import modeling_rwkv
from transformers import pipeline

generate = pipeline("text-generation", model={json.dumps(name, ensure_ascii=False)})
print(generate("Once upon a time", max_new_tokens=50)[0]["generated_text"])
```

Programs that do not import `modeling_rwkv` use it with `trust_remote_code=True`."""


def _chat(folder: Path) -> str:
    said = "## Chat\n\n`pipeline` takes lists of messages, too: there is a chat template."
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if template in {known.text for known in CHAT_TEMPLATES.values()}:  # another might refuse these messages
        (text,), _ = render_jinja_template([CONVERSATION], chat_template=template, add_generation_prompt=True)
        said += f" It writes a conversation so:\n\n```\n{text}\n```"
    path = folder / "generation_config.json"
    stop_strings = GenerationConfig.from_pretrained(folder).stop_strings if path.exists() else None
    if stop_strings:
        stops = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        said += f"\n\nGeneration stops at {' and '.join(f'`{stop!r}`' for stop in stops)}."
    return said
