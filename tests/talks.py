"""What the tests of conversations share: a vocabulary, models that say what they are told, and all that they read."""

import pytest
import torch
from models import agree, contents, make, same
from transformers import LogitsProcessor

from modeling_rwkv import RwkvTokenizer
from modeling_rwkv.chat import Conversation
from modeling_rwkv.chat_templates import CHAT_TEMPLATES

WORDS = ["\n\n", ".\n\n", "User", "User:", "Assistant", "# Instr", " the", "the ", " a"]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {name: template.text for name, template in CHAT_TEMPLATES.items()} | {"none": None, "chatml": CHATML}
STOPS = {name: list(template.stop_strings) for name, template in CHAT_TEMPLATES.items()} | {"chatml": None}


@pytest.fixture(name="vocab", scope="session")
def small_vocabulary(tmp_path_factory):
    """Every byte is a token, and some words that reach over the places where turns begin and end."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
    tokens.append("🙂".encode()[1:3])
    path.write_text("".join(f"{i} {token!r} {len(token)}\n" for i, token in enumerate(tokens, 1)))
    return path


class Spoken(LogitsProcessor):
    """Makes `generate`, after one token of a prompt, say these ids."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        wanted = self.ids[input_ids.shape[1] - 1]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([wanted]), 0.0)


class Talk:
    """A conversation, and every token that its model reads."""

    def __init__(self, vocab, name="world", seed=0, **options):
        self.tokenizer = RwkvTokenizer(vocab)
        self.tokenizer.chat_template = TEMPLATES[name]
        self.model = make({"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 2}, seed=seed)
        self.model.generation_config.update(eos_token_id=0, pad_token_id=0, stop_strings=STOPS.get(name))
        self.read, self.kept, self.counts = [], [], []
        self.model.base_model.register_forward_pre_hook(lambda _, given: self.read.extend(given[0][0].tolist()))
        self.conversation = Conversation(self.model, self.tokenizer, **options)

    def ids(self, parts):
        """Of texts, bytes and ids."""
        found = []
        for part in parts:
            if isinstance(part, int):
                found.append(part)
            else:
                data = part.encode() if isinstance(part, str) else part
                found += self.tokenizer.encode_bytes(data)
        return found

    def say(self, message, answer, write=str, **options):
        """Returns what is answered; ``kept`` become the tokens that the state has read, ``counts`` grow by one."""
        return self._spoken(self.conversation.say, answer, message, write=write, **options)

    def retry(self, answer, write=str, **options):
        """From before the last answer: the tokens of the prompt are known, and the last is read again."""
        return self._spoken(self.conversation.retry, answer, write=write, **options)

    def _spoken(self, method, answer, *args, **options):
        ids, self.read = self.ids(answer), []
        try:
            limit = {"max_new_tokens": len(ids), "do_sample": False}
            return method(*args, logits_processor=[Spoken(ids)], **limit, **options)
        finally:
            self.counts.append(len(self.read))

    def keep(self):
        """After `say`: what the state has read, of what was read in this turn."""
        new = list(self.read)
        while not self.conversation.place.state.has_read(torch.tensor([self.kept + new])):
            new.pop()
        self.kept += new
        return new


def check_state(talk):
    """It is that of the rendering's beginning, read at once by the same tokens."""
    place, kept = talk.conversation.place, torch.tensor([talk.kept])
    assert talk.tokenizer.decode(talk.kept) == place.text
    rendered = talk.conversation._render(talk.conversation.messages)
    assert rendered.startswith(place.text)
    assert talk.conversation.messages[-1]["role"] == "assistant"
    with torch.no_grad():
        agree(contents(place.state), contents(talk.model(kept).past_key_values))


def snapshot(conversation):
    place = conversation.place
    return conversation.messages, place.text, contents(place.state), place.state.seen_tokens


def same_snapshot(actual, expected):
    assert (actual[:2], actual[3]) == (expected[:2], expected[3])
    same(actual[2], expected[2])
