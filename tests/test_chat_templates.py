"""Chat templates say what BlinkDL's programs say, turn by turn, and generation stops where they say."""

import itertools
import json
import re
import shutil
import string
from pathlib import Path

import pytest
import torch
from checkpoint_cases import Shape, blink_state
from commands import refused, rwkv, write_on
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from modeling_rwkv import RwkvForCausalLM, RwkvTokenizer
from modeling_rwkv.chat_templates import CHAT_TEMPLATES
from modeling_rwkv.checkpoints import convert
from modeling_rwkv.stopping import KEPT
from modeling_rwkv.tokenization_rwkv import read_vocab

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
        assert text.index("\n\n") == len(text) - 2 and text == f"{text.strip()}\n\n"
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


@pytest.mark.parametrize("content", [None, 3, [{"type": "text", "text": "x"}]])
def test_contents_that_are_no_text_are_refused(render, content):
    with pytest.raises(Exception, match=r"the content is .*: write text"):
        render([{"role": "user", "content": content}])


# -- beside the weights ----------------------------------------------------------------------------

# What follows what in the model below: it answers "ab", and then does not stop by itself.
NEXT = {":": " ", "\n": "a", " ": "a", "a": "b", "b": "\n\n", "\n\n": "# Instruction:", "# Instruction:": "X"}
ANSWERS = {"world": " ab\n\n", "raven": " ab\n\n", "instruct": "ab\n\n# Instruction:"}
ON = {"world": "# Instruction:X", "raven": "# Instruction:X", "instruct": "X"}  # without a stop


@pytest.fixture(name="vocab", scope="module")
def vocabulary_file(tmp_path_factory) -> Path:
    """Every byte, and the longer tokens of NEXT."""
    tokens = [bytes([byte]) for byte in range(256)] + [text.encode() for text in NEXT if len(text) > 1]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("".join(f"{i} {token!r} {len(token)}\n" for i, token in enumerate(tokens, start=1)))
    return path


@pytest.fixture(name="pth", scope="module")
def parrot(vocab: Path, tmp_path_factory) -> Path:
    """A checkpoint whose every token decides the next one, by NEXT, else "X": its blocks add nothing."""
    ids = {token.decode("latin-1"): i for token, i in read_vocab(vocab).items()}
    state = blink_state(Shape(len(ids) + 1, 40, 40, 40, 1))
    for name in ("blocks.0.att.output.weight", "blocks.0.ffn.value.weight"):
        state[name].zero_()
    for norm in ("blocks.0.ln0", "ln_out"):
        state[f"{norm}.weight"].fill_(1)
        state[f"{norm}.bias"].zero_()
    embeddings = torch.nn.functional.layer_norm(state["emb.weight"], (40,))
    state["head.weight"].zero_()
    state["head.weight"][ids["X"]] = 0.01 * embeddings.sum(0)
    for text, following in NEXT.items():
        state["head.weight"][ids[following]] += embeddings[ids[text]]
    path = tmp_path_factory.mktemp("pth") / "parrot.pth"
    torch.save(state, path)
    return path


@pytest.fixture(name="folder", scope="module", params=CHAT_TEMPLATES)
def converted_for_chat(request, pth: Path, vocab: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / request.param
    convert(pth, folder, vocab=vocab, chat=request.param, progress=False)
    return folder


def test_a_folder_has_the_template_and_its_stop_strings(folder):
    template = CHAT_TEMPLATES[folder.name]
    assert (folder / "chat_template.jinja").read_text() == template.text
    assert AutoTokenizer.from_pretrained(folder).chat_template == template.text
    settings = json.loads((folder / "generation_config.json").read_text())
    assert (settings["stop_strings"], settings["eos_token_id"]) == (list(template.stop_strings), 0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_plain_generate_stops(folder, options):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(said("q", first="user"), add_generation_prompt=True, return_tensors="pt")

    def answer(**arguments):
        written = model.generate(**inputs, max_new_tokens=9, **options, **arguments)
        return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])

    assert answer() == answer(tokenizer=tokenizer) == ANSWERS[folder.name]
    assert answer(stop_strings=["b"]) == ANSWERS[folder.name].partition("b")[0] + "b"
    assert answer(stop_strings=None) == answer(stop_strings=[])
    assert answer(stop_strings=None).startswith(ANSWERS[folder.name] + ON[folder.name])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_of_conversations_stops(folder, batch_size):
    chats = [said("q", first="user"), said("s", "a longer question"), said("s", "q", "a")]  # the last one goes on
    chat = pipeline("text-generation", model=str(folder), batch_size=batch_size)
    answers = [found[0]["generated_text"][-1] for found in chat(chats, max_new_tokens=9)]
    assert [answer["role"] for answer in answers] == ["assistant"] * 3
    whole = ANSWERS[folder.name]
    assert [answer["content"] for answer in answers] == [whole, whole, "a" + whole.partition("a")[2]]
    again = chat.tokenizer.apply_chat_template([*chats[0], answers[0]], tokenize=False)
    assert again == chat.tokenizer.apply_chat_template(said("q", "ab", first="user"), tokenize=False)


@pytest.mark.parametrize("options", [{"subfolder": "inner"}, {"revision": "old"}, {"revision": "0" * 40}], ids=str)
def test_the_tokenizer_is_that_of_the_same_place(options, folder, tmp_path):
    """A folder in a repository, or a revision of it, as the Hub's cache has them; the newest has no tokenizer."""
    source, refs = tmp_path / "models--me--fox", {"main": "1" * 40, "old": "0" * 40}
    for name, commit in refs.items():
        (source / "refs").mkdir(parents=True, exist_ok=True)
        (source / "refs" / name).write_text(commit)
        revision = source / "snapshots" / commit
        shutil.copytree(folder, revision / "inner")
        shutil.copytree(folder, revision, dirs_exist_ok=True, ignore=None if name == "old" else no_tokenizer)
    for load in (AutoModelForCausalLM, RwkvForCausalLM):
        model = load.from_pretrained("me/fox", cache_dir=tmp_path, **options)
        written = model.generate(torch.tensor([[1, 2]]), max_new_tokens=9)
        again = model.generate(
            torch.tensor([[1, 2]]), max_new_tokens=9, tokenizer=AutoTokenizer.from_pretrained(folder)
        )
        assert torch.equal(written, again)


def no_tokenizer(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if "token" in name]


@pytest.mark.parametrize("where", ["nowhere", "an empty folder", "a folder with the model alone"])
def test_a_model_without_its_tokenizer_says_so(where, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if where == "a folder with the model alone":
        model.save_pretrained(tmp_path)
    model.config.name_or_path = "" if where == "nowhere" else str(tmp_path)
    with pytest.raises(ValueError, match=r"stop strings.* tokenizer=.* stop_strings=None"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, stop_strings=None).shape == (1, 4)


def test_the_command_stops(folder):
    assert write_on(folder, "--temperature", 0, prompt="Hi:").stdout.startswith("Hi: ab\n\n")
    assert "X" not in write_on(folder, "--temperature", 0, prompt="Hi:").stdout


@pytest.mark.parametrize(
    ("options", "template"), [([], "world"), (["--chat", "none"], None), (["--chat", "raven"], "raven")]
)
def test_which_template_a_conversion_writes(options, template, pth, vocab, tmp_path):
    assert rwkv("convert", pth, tmp_path / "out", "--vocab", vocab, *options).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == (template and CHAT_TEMPLATES[template].text)
    stop_strings = GenerationConfig.from_pretrained(tmp_path / "out").stop_strings
    assert stop_strings == (template and list(CHAT_TEMPLATES[template].stop_strings))


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize(
    ("options", "template"), [([], "own"), (["--chat", "none"], None), (["--chat", "raven"], "raven")]
)
def test_a_folder_of_a_tokenizer_keeps_its_template(options, template, old_style, pth, vocab, tmp_path):
    tokenizer = RwkvTokenizer(vocab, chat_template="own")
    tokenizer.save_pretrained(tmp_path / "tokenizer", save_jinja_files=not old_style)
    result = rwkv("convert", pth, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer", *options)
    assert result.exit_code == 0, result.stderr
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert found == (CHAT_TEMPLATES[template].text if template in CHAT_TEMPLATES else template)


@pytest.mark.parametrize("options", [[], ["--chat", "none"]])
def test_a_folder_of_a_tokenizer_keeps_its_stop_strings(options, folder, pth, tmp_path):
    """They belong to the template that is kept."""
    assert rwkv("convert", pth, tmp_path / "out", "--tokenizer", folder, *options).exit_code == 0
    stop_strings = GenerationConfig.from_pretrained(tmp_path / "out").stop_strings
    assert stop_strings == (None if options else list(CHAT_TEMPLATES[folder.name].stop_strings))


def test_stop_strings_are_not_kept_without_end(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for letter in string.ascii_letters:
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=1, stop_strings=letter)
    assert len(model._stops) == KEPT


def test_a_template_that_cannot_be_written(pth, vocab, folder, tmp_path):
    refused(rwkv("convert", pth, tmp_path / "out", "--vocab", vocab, "--chat", "alpaca"), "alpaca", "raven")
    refused(rwkv("convert", pth, tmp_path / "out", "--chat", "raven"), "raven", "tokenizer")
    refused(rwkv("convert", folder, tmp_path / "out.pth", "--chat", "raven"), "tokenizer")
    assert not list(tmp_path.iterdir())
