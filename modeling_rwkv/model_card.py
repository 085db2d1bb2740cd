"""Model cards: a README.md that says what the files beside it say."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig
from yaml import YAMLError

from modeling_rwkv.chat_templates import CHAT_TEMPLATES
from modeling_rwkv.configuration_rwkv import RwkvConfig
from modeling_rwkv.modeling_rwkv import RwkvForCausalLM
from modeling_rwkv.sharing import is_shared

SIZES = ("num_hidden_layers", "hidden_size", "attention_hidden_size", "intermediate_size", "vocab_size")
HEAD = "---\nlibrary_name: transformers\n---"
CONVERSATION = [
    {"role": "user", "content": "What does the fox eat?"},
    {"role": "assistant", "content": "Red berries, every day."},
    {"role": "user", "content": "Why?"},
]


def write_model_card(folder: str | os.PathLike[str]) -> list[Path]:
    """Write README.md from the files in ``folder``, or fill in what the head of the one that is there lacks.

    The text of a card that is there is never touched. The licence is for the author to state.
    Returns the README.md if it was written or changed.

    Raises:
        ValueError: the head of the card that is there is not YAML.
    """
    folder = Path(folder).resolve()
    path = folder / "README.md"
    is_new = not path.exists()
    try:
        card = ModelCard(f"{HEAD}\n\n{_text(folder)}") if is_new else ModelCard.load(path)
    except YAMLError as error:
        raise ValueError(f"the head of {path} is not YAML ({error}); mend it, or remove the file") from error
    data: Any = card.data
    before = data.to_dict()
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.tags = list(dict.fromkeys([*(data.tags or []), "rwkv"]))
    if data.to_dict() == before and not is_new:
        return []
    unfinished = path.with_name(f"{path.name}.unfinished")
    card.save(unfinished)
    os.replace(unfinished, path)
    return [path]


def _text(folder: Path) -> str:
    config = RwkvConfig.from_pretrained(folder)
    parts = [f"# {folder.name}", _sizes(config), _use(folder.name, config)]
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


def _use(name: str, config: RwkvConfig) -> str:
    text = f"""## Use

`pip install modeling-rwkv`, then

```python
import modeling_rwkv
from transformers import pipeline

generate = pipeline("text-generation", model="{name}")
print(generate("Once upon a time", max_new_tokens=50)[0]["generated_text"])
```"""
    if is_shared(getattr(config, "auto_map", None)):
        text += "\n\nPrograms that do not import `modeling_rwkv` use it with `trust_remote_code=True`."
    return text


def _chat(folder: Path) -> str:
    said = "## Chat\n\n`pipeline` takes lists of messages, too: there is a chat template."
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if template in {known.text for known in CHAT_TEMPLATES.values()}:  # another might refuse these messages
        text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            CONVERSATION, tokenize=False, add_generation_prompt=True
        )
        said += f" It writes a conversation so:\n\n```\n{text}\n```"
    path = folder / "generation_config.json"
    stop_strings = GenerationConfig.from_pretrained(folder).stop_strings if path.exists() else None
    if stop_strings:
        said += f"\n\nGeneration stops at {' and '.join(f'`{stop!r}`' for stop in stop_strings)}."
    return said
