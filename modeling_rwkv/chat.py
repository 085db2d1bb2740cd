r"""Conversations that keep the recurrent state: a turn costs its own tokens, however long the talk.

A conversation is a text that only grows: the chat template's rendering of its messages. Of every turn the model reads
what the template puts after the text that it has read before: the end of its last answer, the message, the beginning
of an answer. Each such piece is tokenised alone, so no token reaches from one turn into the next, even where the whole
text would have one there; RWKV's own chat programs read so, too.

A state cannot take back a token, and an answer ends with tokens that are not of it: a stop string, white space that
the template strips. So the state that is kept is a copy from before these, of the last token after which what was read
is the beginning of the rendering. What the rendering has after it is read with the next turn.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from modeling_rwkv.cache import RwkvCache, saved_notes
from modeling_rwkv.chat_templates import CHAT_TEMPLATES
from modeling_rwkv.generation import encode
from modeling_rwkv.prefill import read
from modeling_rwkv.streaming import TextPieces

VERSION = 1  # of what `Conversation.save` writes beside the state
_NOTE = "conversation"
Message = dict[str, str]  # role and content
Write = Callable[[str], object]


@dataclass(frozen=True)
class Place:
    """A point in the text of a conversation: what is before it, and the state after reading that."""

    text: str
    state: RwkvCache


@dataclass(frozen=True, eq=False)
class Turn:
    """A message, and what leads back to before it (undo) and to before its answer (retry).

    messages: with the new one; prompt: their rendering, up to the answer; ids: (1, n) int64, what of it was new;
    state: after all of them but the last, from which the first token of an answer is drawn.
    """

    before: tuple[list[Message], Place]
    messages: list[Message]
    prompt: str
    ids: Tensor
    state: RwkvCache


class Conversation:
    """A talk with a model. Copies of its state, two for each turn, are kept for `undo` and `retry`.

    `place` is how far the model has read, `messages` what was said, as `apply_chat_template` takes it.

    Args:
        model: an `RwkvForCausalLM` in eval mode. An answer ends at the end-of-text tokens of its generation config.
        tokenizer: of the model.
        system: the system message, read with the first message of the user.
        template: how messages are written, and before what an answer ends: one of chat_templates.py. By default the
            tokenizer's chat template and the stop strings of the model's generation config, or else "world".
        progress: show on stderr how much of a message is read that is longer than the model's ``prefill_tokens``.

    Raises:
        ValueError: there is no such template, or it refuses such messages, or changes what was said before when more
            is said.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        template: str | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.tokenizer, self._progress = model, tokenizer, progress
        if template is None and not tokenizer.chat_template:
            template = "world"
        if template is not None and template not in CHAT_TEMPLATES:
            raise ValueError(f"the template is {template!r}: choose {', '.join(CHAT_TEMPLATES)}")
        self._template = None if template is None else CHAT_TEMPLATES[template]
        stops = self._template.stop_strings if self._template else model.generation_config.stop_strings or ()
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._check_template()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[Message] = self._system
        self.place = Place("", RwkvCache())
        self._turns: list[Turn] = []

    @torch.no_grad()
    def say(self, message: str, write: Write = lambda piece: None, **options: Any) -> str:
        """The answer to ``message``, without white space around it.

        An exception while it is written, such as KeyboardInterrupt, ends it: what was written so far is the answer.

        Args:
            write: is given the pieces of the answer as they come.
            options: of `generate`, among them ``max_new_tokens``; one text is written, without beams. Its
                ``stopping_criteria`` are asked beside ours, about the last token of the prompt and the answer's.

        Raises:
            ValueError: the template refuses the message, or changes what was said before; nothing has changed.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = self._render(messages, asks=True)
        new = _after(self.place.text, prompt)
        ids = encode(
            self.model, self.tokenizer, new, add_special_tokens=False, split_special_tokens=self._template is not None
        )
        state = self.place.state.clone()
        read(self.model, ids[:, :-1], state, progress=self._progress)
        return self._answer(Turn((self.messages, self.place), messages, prompt, ids, state), write, options)

    def retry(self, write: Write = lambda piece: None, **options: Any) -> str:
        """Another answer to the last message, drawn from the state before the first one.

        Raises:
            ValueError: there is none.
        """
        if not self._turns:
            raise ValueError("there is no answer here to draw again: say something first")
        return self._answer(self._turns[-1], write, options)

    def undo(self) -> str:
        """Take back the last message, which is returned, and its answer, by the state from before them.

        Raises:
            ValueError: there is none, or none since :meth:`load`.
        """
        if not self._turns:
            raise ValueError("there is nothing here to undo: say something first")
        turn = self._turns.pop()
        self.messages, self.place = turn.before
        return turn.messages[-1]["content"]

    def save(self, path: str | os.PathLike) -> None:
        """Write state and messages to one safetensors file, whole or not at all; the messages as JSON in its metadata.

        The file is one of :meth:`RwkvCache.save`, and loads as such.

        Raises:
            ValueError: nothing has been said yet, or something else is in the file.
        """
        if not self.place.state.is_initialized:
            raise ValueError("nothing has been said yet, so there is nothing to save: say something first")
        if os.path.isfile(path) and _NOTE not in _notes_or_none(path):
            raise ValueError(f"{path} is there, and is no saved conversation: choose another name")
        talk = {"version": VERSION, "messages": self.messages, "text": self.place.text}
        self.place.state.save(path, self.model, {_NOTE: json.dumps(talk, ensure_ascii=False)})

    def load(self, path: str | os.PathLike) -> None:
        """Go on where a saved conversation was, system message included; there is no undo to before that.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no saved conversation, or one with another model or chat template; nothing has changed.
        """
        state = RwkvCache.load(path, self.model.device, self.model)
        messages, text = _read_talk(path)
        if not self._render(messages).startswith(text):
            raise ValueError(
                f"{path} was written with another chat template: choose that one (template=, rwkv chat --template), "
                "or give the tokenizer that it was saved with"
            )
        self.messages, self.place, self._turns = messages, Place(text, state), []
        self._system = [message for message in messages[:1] if message["role"] == "system"]

    def _answer(self, turn: Turn, write: Write, options: dict[str, Any]) -> str:
        answer = Answer(turn, self.tokenizer, self._stops, write)
        alone = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "stop_strings": None}
        alone["cache_implementation"] = None  # the cache is given
        alone["stopping_criteria"] = StoppingCriteriaList([answer, *(options.get("stopping_criteria") or ())])
        try:
            self.model.generate(
                turn.ids[:, -1:],
                # Longer than the ids, it says that they are new, whatever the state has read.
                attention_mask=torch.ones(1, 2, dtype=torch.long, device=turn.ids.device),
                past_key_values=answer.state,
                **options | alone,
            )
            answer.end()
        finally:
            if answer.places:
                self._keep(turn, answer)
        return answer.text

    def _keep(self, turn: Turn, answer: "Answer") -> None:
        messages = [*turn.messages, {"role": "assistant", "content": answer.text}]
        rendered = self._render(messages)
        fitting = [place for place in answer.places if rendered.startswith(place.text)]
        self.place = fitting[-1] if fitting else answer.places[0]
        self.messages = messages
        if turn not in self._turns:
            self._turns.append(turn)

    def _render(self, messages: list[Message], asks: bool = False) -> str:
        """The text of a conversation; ``asks``: and the beginning of an answer."""
        template = self._template and self._template.text
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=asks
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def _check_template(self) -> None:
        """That it only ever adds to what was said, as far as three messages show."""
        messages, text = list(self._system), ""
        for role in ("user", "assistant", "user"):
            messages.append({"role": role, "content": "Yes."})
            rendered = self._render(messages, asks=role == "user")
            _after(text, rendered)
            text = rendered


class Answer(StoppingCriteria):
    """Listens to `generate`: shows an answer as it comes, ends it at a stop string, and copies the state.

    generated: the whole characters so far; places: where the state was before the first token, and, if that is later,
    at the last point that is within the answer whatever comes. None before the first token is drawn.
    """

    def __init__(self, turn: Turn, tokenizer: PreTrainedTokenizerBase, stops: list[str], write: Write) -> None:
        self.state = turn.state.clone()
        self.generated = ""
        self.places: list[Place] = []
        self._prompt, self._stops, self._write, self._shown = turn.prompt, stops, write, 0
        self._pieces = TextPieces(tokenizer, self._take)
        self._pieces.put(turn.ids)

    @property
    def text(self) -> str:
        return self.generated[: self._length(is_over=True)].strip()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """With every new token, input_ids: (1, n); the state has read all of them but the last."""
        read, is_whole = self.generated, self._pieces.is_whole
        self._pieces.put(input_ids[:, -1])
        length = self._length(is_over=False)
        if (is_whole and len(read) <= length) or not self.places:
            self.places[1:] = [Place(self._prompt + read, self.state.clone())]
        self._show(length)
        is_stopped = any(stop in self.generated for stop in self._stops)
        return torch.full((1,), is_stopped, device=input_ids.device)

    def end(self) -> None:
        """Show what was held back, because it could have been the beginning of a stop string."""
        self._show(self._length(is_over=True))

    def _take(self, piece: str) -> None:
        self.generated += piece

    def _length(self, is_over: bool) -> int:
        """The length of the answer with the white space before it: without a stop string, and white space after it.

        Unless the answer ``is_over``, also without what may become a stop string.
        """
        ends = [self.generated.find(stop) for stop in self._stops if stop in self.generated]
        if not ends and not is_over:
            ends = [len(self.generated) - _overlap(self.generated, stop) for stop in self._stops]
        return len(self.generated[: min(ends, default=None)].rstrip())

    def _show(self, length: int) -> None:
        begin = self._shown or len(self.generated) - len(self.generated.lstrip())
        if length > begin:
            self._shown = length
            self._write(self.generated[begin:length])


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of ``stop``, not all of it, that ``text`` ends with."""
    return next(n for n in reversed(range(len(stop))) if text.endswith(stop[:n]))


def _after(text: str, longer: str) -> str:
    if not longer.startswith(text):
        raise ValueError(
            "the tokenizer's chat template changes what was said before when more is said, which a state that has "
            "read it cannot: choose another one (template=, rwkv chat --template)"
        )
    return longer[len(text) :]


def _notes_or_none(path: str | os.PathLike) -> dict[str, str]:
    try:
        return saved_notes(path)
    except ValueError:
        return {}


def _read_talk(path: str | os.PathLike) -> tuple[list[Message], str]:
    """The messages, and what of their rendering was read, in a saved conversation."""
    note = saved_notes(path).get(_NOTE)
    if note is None:
        raise ValueError(f"{path} holds a state but no conversation: begin with it, as rwkv chat --state does")
    try:
        talk = json.loads(note)
        if talk["version"] != VERSION:
            raise ValueError(
                f"{path} is a conversation of format {talk['version']}, and this program reads format {VERSION}: "
                "use the version of modeling-rwkv that wrote it"
            )
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in talk["messages"]], str(talk["text"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its conversation cannot be read ({error!r})") from error
