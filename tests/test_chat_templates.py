"""Chat templates say what BlinkDL's programs say, turn by turn, and generation stops where they say."""

import itertools
import re

import pytest
from transformers import PreTrainedTokenizerFast

from modeling_rwkv import RwkvTokenizer
from modeling_rwkv.chat_templates import CHAT_TEMPLATES

CONTENTS = ["a", " two  words\n", "line\nline", "blank\n\n\nline\r\n\r\nend", "", "\n \n", "User: x\n\nAssistant: y"]
TEXTS = {  # of a system message s, a question q, an answer a and a question r
    "world": "System: s\n\nUser: q\n\nAssistant: a\n\nUser: r\n\nAssistant:",
    "raven": "s\n\nBob: q\n\nAlice: a\n\nBob: r\n\nAlice:",
    "instruct": "s\n\n# Instruction:\nq\n\n# Response:\na\n\n# Instruction:\nr\n\n# Response:\n",
}


def said(*contents: str, first: str = "system") -> list[dict[str, str]]:
    """Messages of the system, or not, and then of the user and the assistant in turn."""
    turns = itertools.cycle(["user", "assistant"])
    roles = itertools.chain(["system"], turns) if first == "system" else turns
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def cleaned(text: str) -> str:
    """What ChatRWKV makes of a message."""
    return re.sub(r"\n+", "\n", text.replace("\r\n", "\n").strip())


@pytest.fixture(name="world", scope="module")
def world_tokenizer() -> RwkvTokenizer:
    return RwkvTokenizer()


@pytest.fixture(name="render", params=CHAT_TEMPLATES)
def rendered_by_a_template(request, world: PreTrainedTokenizerFast):
    template = CHAT_TEMPLATES[request.param].text

    def render(messages, tokenize=False, **options):
        return world.apply_chat_template(messages, chat_template=template, tokenize=tokenize, **options)

    render.name = request.param
    return render


def test_a_conversation(render):
    assert render(said("s", "q", "a", "r"), add_generation_prompt=True) == TEXTS[render.name]


def test_an_instruction_alone(world):
    text = world.apply_chat_template(
        said("q", first="user"),
        chat_template=CHAT_TEMPLATES["instruct"].text,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n# Instruction:\nq\n\n# Response:\n"
    )


@pytest.mark.parametrize("first", ["system", "user"])
@pytest.mark.parametrize("shift", range(len(CONTENTS)))
def test_a_conversation_only_grows(render, shift, first):
    """Each rendering begins with the one before, and with the beginning of the answer that is asked for."""
    messages = said(*CONTENTS[shift:], *CONTENTS[:shift], first=first)
    for end in range(1, len(messages)):
        before, after = render(messages[:end]), render(messages[: end + 1])
        assert after.startswith(before)
        if messages[end]["role"] == "assistant":
            asked = render(messages[:end], add_generation_prompt=True)
            assert asked.startswith(before) and after.startswith(asked)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_message_ends_at_the_first_blank_line(render, role, content):
    """Its own last one. Answers to instructions, which do not end there, may have blank lines."""
    before = [] if role == "system" else said("q", first="user") if role == "assistant" else said("s")
    text = render([*before, {"role": role, "content": content}]).removeprefix(render(before) if before else "")
    if render.name == "instruct" and role == "assistant":
        assert text == f"# Response:\n{content.replace(chr(13), '').strip()}\n\n"
    else:
        text = text.removeprefix("# Instruction:\n") if render.name == "instruct" else text
        assert text.index("\n\n") == len(text) - 2
        assert text.strip().endswith(cleaned(content))


def test_a_written_answer_can_be_said_again(render):
    """An answer as it is generated, with the space before and the stop string after it, is that answer."""
    for stop in CHAT_TEMPLATES[render.name].stop_strings:
        assert render(said("s", "q", f" a{stop}", "r")) == render(said("s", "q", "a", "r"))


def test_only_answers_are_in_the_assistant_masks(render, world):
    messages = said("s", "q", "a\nb", "r", "c d")
    found = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, kept in zip(found["input_ids"], found["assistant_masks"], strict=True) if kept]
    space = "" if render.name == "instruct" else " "
    assert world.decode(learned) == f"{space}a\nb\n\n{space}c d\n\n"
    assert world.decode(found["input_ids"]) == render(messages)


@pytest.mark.parametrize("begun", ["a", "a b ", "a\nb"])
def test_an_answer_goes_on(render, begun):
    messages = said("s", "q", begun)
    assert render(messages, continue_final_message=True) == render(messages).rstrip()


@pytest.mark.parametrize("role", ["tool", "", "User"])
def test_other_roles_are_refused(render, role):
    with pytest.raises(Exception, match=f'the role is "{role}": write system, user or assistant'):
        render([{"role": role, "content": "x"}])
