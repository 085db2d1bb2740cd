r"""Rows of instruction sets, chats and texts as tokens, of which the answers are learned.

| columns                      | read as                                           | learned                |
|------------------------------|---------------------------------------------------|------------------------|
| messages                     | the tokenizer's chat template; without one, that  | turns of the assistant |
|                              | of the World models: `User: ...`, `Assistant: ..` |                        |
| prompt, completion           | one after the other, nothing between              | completion             |
| instruction, [input,] output | `Instruction: ...\n\nInput: ...\n\nResponse: ...` | output                 |
| text                         | as it is                                          | everything             |

The first of these whose columns are there is chosen, unless `columns` says otherwise. An answer ends with the
end-of-text token, which is learned, too. Prompt and answer are tokenised apart, so that a model is trained on the
very tokens that it sees when it generates. A text that spells a special token such as `<|endoftext|>` gets the tokens
of its letters; under a chat template it is the special token, whoever wrote it.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from modeling_rwkv.chat_templates import CHAT_TEMPLATES
from rwkv_finetune.arguments import Refusal
from rwkv_finetune.sources import Source

logger = logging.getLogger(__name__)

FORMATS = {  # name: columns, in the order in which they are looked for; "?" may be missing
    "chat": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "instruction": ("instruction", "input?", "output"),
    "text": ("text",),
}
Segment = tuple[str, bool]  # text, and whether it is learned
Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """What the columns of a set mean: `columns` maps the names of FORMATS to those of the set."""

    name: str
    columns: dict[str, str]

    def segments(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        """The text of a row, cut where learning begins or ends.

        Raises:
            Refusal: a column that does not hold what it should: which, what was expected, and what is there.
        """
        if self.name == "chat":
            messages = _messages(row[self.columns["messages"]], self.columns["messages"])
            return _templated(messages, tokenizer)
        parts = {part: _text(row.get(column), column, part) for part, column in self.columns.items()}
        if self.name == "prompt and completion":
            return [(parts["prompt"], False), (parts["completion"], True)]
        if self.name == "instruction":
            return [
                (instruction_prompt(parts["instruction"], parts.get("input", "")), False),
                (f" {parts['output']}", True),
            ]
        return [(parts["text"], True)]


def find_format(names: Sequence[str], columns: Iterable[str] = ()) -> Format:
    """What the columns `names` of a set mean.

    Args:
        columns: words `part=column`, for a set that calls a part otherwise: `prompt=question`.

    Raises:
        Refusal: no format fits, or a column that is asked for is not there.
    """
    pairs = [word.partition("=") for word in columns]
    given = {part: column for part, _, column in pairs}
    for name, parts in FORMATS.items():
        known = [part.rstrip("?") for part in parts]
        found = {part: given.get(part, part) for part in known}
        optional = {part.rstrip("?") for part in parts if part.endswith("?")} - given.keys()
        missing = [column for part, column in found.items() if column not in names and part not in optional]
        if given and not given.keys() <= set(known):
            continue
        if not missing:
            return Format(name, {part: column for part, column in found.items() if column in names})
        if given:
            raise Refusal(f"there is no column {missing[0]!r}; there are {', '.join(names)}")
    wanted = "; ".join(", ".join(parts).replace("input?", "[input]") for parts in FORMATS.values())
    if given:
        raise Refusal(f"columns {' '.join(map('='.join, given.items()))} name no format; the parts are {wanted}")
    raise Refusal(
        f"the columns are {', '.join(names)}, expected were {wanted}; "
        "name them, for example with --columns prompt=question completion=answer"
    )


def instruction_prompt(instruction: str, content: str = "") -> str:
    """What is put before the answer to an instruction, which follows after a space."""
    middle = f"\n\nInput: {content}" if content.strip() else ""
    return f"Instruction: {instruction}{middle}\n\nResponse:"


def _text(value: Any, column: str, part: str) -> str:
    if isinstance(value, str):
        return value
    if value is None and part == "input":
        return ""
    raise Refusal(f"column {column!r}: expected text, there is {_shown(value)}")


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise Refusal(f"column {column!r}: expected a list of messages, there is {_shown(value)}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise Refusal(f"column {column!r}: expected messages with role and content, there is {_shown(message)}")
    if all(message["role"] != "assistant" for message in value):
        raise Refusal(f"column {column!r}: expected a message of the assistant, there is none to learn from")
    return value


def _templated(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Each answer is what the template adds to the conversation before it and to its own beginning of a turn."""
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    if not tokenizer.chat_template:
        render = partial(render, chat_template=CHAT_TEMPLATES["world"].text)
    segments: list[Segment] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn == 0:  # a greeting answers nothing
            continue
        try:
            before, after = render(messages[:turn], add_generation_prompt=True), render(messages[: turn + 1])
        except (ArithmeticError, TemplateError, TypeError, ValueError) as error:
            raise Refusal(f"the chat template refuses the messages: {error}") from error
        if not before.startswith(done) or not after.startswith(before):
            raise Refusal(
                "the tokenizer's chat template changes earlier turns when later ones come, so that answers cannot be "
                "told from prompts; take the template away from the tokenizer, and a plain one is used"
            )
        segments += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return segments


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)[:60]


@dataclass
class Encoder:
    """Rows to `tokens` and `learned`, for `map(encoder, batched=True, with_indices=True)`.

    An answered example longer than `context_length` loses its end, a text does not (packing cuts it in pieces); one
    with nothing left to learn is dropped. `warn` says how many.
    """

    source: Source
    format: Format
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    shortened: int = field(default=0, init=False)
    dropped: int = field(default=0, init=False)

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples = [self._segments(row, index) for row, index in zip(rows, indices, strict=True)]
        ids = iter(self._tokenize([text for segments in examples for text, _ in segments]))
        encoded = [self._limit(*self._join([(next(ids), learned) for _, learned in e])) for e in examples]
        kept = [example for example in encoded if any(example[1][1:])]
        self.dropped += len(encoded) - len(kept)
        return {"tokens": [tokens for tokens, _ in kept], "learned": [learned for _, learned in kept]}

    def warn(self) -> None:
        """Once, of all that was lost."""
        if self.shortened or self.dropped:
            logger.warning(
                f"{self.source.name}: {self.shortened:,} examples were longer than context_length "
                f"{self.context_length} and lost their ends; {self.dropped:,} had nothing to learn and were dropped"
            )

    def _segments(self, row: Row, index: int) -> list[Segment]:
        try:
            return self.format.segments(row, self.tokenizer)
        except Refusal as error:
            raise Refusal(f"{self.source.place(index)}: {error}") from error

    @property
    def _templates(self) -> bool:
        return self.format.name == "chat" and bool(self.tokenizer.chat_template)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """A text that spells a special token gets the tokens of its letters; a chat template means it."""
        if not texts:  # of a batch of greetings, to which no question was put; tokenizers want a text at least
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False}
        return self.tokenizer(texts, split_special_tokens=not self._templates, **options)["input_ids"]

    def _join(self, segments: list[tuple[list[int], bool]]) -> tuple[list[int], list[bool]]:
        """A plain answer ends with the end of text; a template ends its own, and the last at least needs one."""
        end = self.tokenizer.eos_token_id
        tokens: list[int] = []
        learned: list[bool] = []
        for number, (ids, is_answer) in enumerate(segments, 1):
            unended = number == len(segments) and end not in ids if self._templates else is_answer
            ids = [*ids, end] if unended else ids
            tokens += ids
            learned += [is_answer] * len(ids)
        return tokens, learned

    def _limit(self, tokens: list[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
        if self.format.name == "text" or len(tokens) <= self.context_length:
            return tokens, learned
        self.shortened += 1
        return tokens[: self.context_length], learned[: self.context_length]
