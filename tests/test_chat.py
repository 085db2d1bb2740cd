"""Conversations: the state is that of the text that was rendered, a turn costs its own tokens, and nothing is lost."""

import pytest
import torch
from models import agree, contents
from talks import CHATML, TEMPLATES, Talk, check_state, same_snapshot, small_vocabulary, snapshot  # noqa: F401

from modeling_rwkv import RwkvTokenizer
from modeling_rwkv.chat import Conversation
from modeling_rwkv.chat_templates import CHAT_TEMPLATES

ANSWERS = {  # what is generated
    "ends before a stop string": [" the end\n\n"],
    "is cut by the limit": [" the en"],
    "shares a token with the stop string": [" the end.\n\n"],
    "has a line break": [" the\nend \n x\n\n"],
    "ends with the end of text": [" the end", 0],
    "is no answer": [0],
    "is white space": [" \n \n \n"],
    "begins otherwise": ["\n  the end\n\n"],
    "has a character of several tokens": [" 狐狸 🙂\n\n"],
    "stops in a character": [" the 狐狸".encode()[:-1]],
    "only seems to stop": [" the\n\n# Instruct\n\n# Instruction:"],
}
every_template = pytest.mark.parametrize("name", TEMPLATES)
every_answer = pytest.mark.parametrize("kind", ANSWERS)


@every_template
@every_answer
def test_the_state_is_that_of_the_rendered_conversation(vocab, name, kind):
    talk = Talk(vocab, name, system="the rules")
    for turn, message in enumerate(["the fox?", "a\n狐狸 🙂", "User: x"]):
        before = talk.conversation.place.text
        answer = ANSWERS[kind] if turn != 1 else [" a\n\n", *ANSWERS[kind]]
        talk.say(message, answer)
        new = talk.keep()
        check_state(talk)
        prompt = talk.conversation._turns[-1].prompt
        piece = talk.tokenizer(prompt[len(before) :], add_special_tokens=False).input_ids
        assert new[: len(piece)] == piece  # tokenised alone, whatever the turn before


EXPECTED = {
    "ends before a stop string": "the end",
    "is cut by the limit": "the en",
    "shares a token with the stop string": "the end.",
    "has a line break": "the\nend \n x",
    "ends with the end of text": "the end",
    "is no answer": "",
    "is white space": "",
    "begins otherwise": "the end",
    "has a character of several tokens": "狐狸 🙂",
    "stops in a character": "the 狐",
    "only seems to stop": "the",
}


@pytest.mark.parametrize("name", ["world", "raven", "instruct", "none"])
@every_answer
def test_an_answer_is_shown_as_it_comes_and_ends_before_its_stop_string(vocab, name, kind):
    expected = EXPECTED[kind]
    if kind == "only seems to stop" and name == "instruct":
        expected = "the\n\n# Instruct"
    pieces = []
    talk = Talk(vocab, name)
    answer = talk.say("the fox?", ANSWERS[kind], pieces.append)
    assert answer == "".join(pieces) == talk.conversation.messages[-1]["content"] == expected
    assert all(piece for piece in pieces)
    if kind == "has a character of several tokens" and name != "instruct":
        assert pieces == ["狐", "狸", " 🙂"]


def test_an_answer_ends_where_the_model_ends_it(vocab):
    """And nowhere else: text after a stop string is not generated."""
    talk = Talk(vocab)
    assert talk.say("the fox?", [" the end\n\n", "User: no"]) == "the end"
    assert talk.counts[0] == len(talk.conversation._turns[0].ids[0]) + len(talk.ids([" the end\n\n"])) - 1


def test_an_answer_ends_where_a_criterion_says(vocab):
    """Which sees the answer from the last token of the prompt on; stop strings end it all the same."""
    seen = []

    def criterion(ids, scores, **options):
        seen.append(ids[0].tolist())
        return torch.tensor([len(seen) == 3])

    talk = Talk(vocab)
    assert talk.say("the fox?", [" ", "e", "n", "d"], stopping_criteria=[criterion]) == "en"
    assert [ids[1:] for ids in seen] == [talk.ids([" "]), talk.ids([" ", "e"]), talk.ids([" ", "e", "n"])]
    talk.keep()
    check_state(talk)
    seen.clear()
    assert talk.retry(["e", "\n\n", "x"], stopping_criteria=[criterion]) == "e"


COSTS = {  # what stands around a message, and an answer that ends by several tokens
    "world": ("\n\nUser: the fox?\n\nAssistant:", [" the end of 狐狸", "\n", "\n"]),
    "instruct": ("\n\n# Instruction:\nthe fox?\n\n# Response:\n", ["the end of 狐狸\n\n# Instruction:"]),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_turn_costs_its_own_tokens(vocab, name):
    """However long the talk: the message, what stands around it, and the answer, but for the answer's last token."""
    talk, (around, answer) = Talk(vocab, name), COSTS[name]
    for _ in range(12):
        talk.say("the fox?", answer)
    piece = len(talk.tokenizer(around).input_ids)
    assert piece - 2 <= talk.counts[1] - len(talk.ids(answer)) + 1 <= piece  # line breaks may have been read before
    assert set(talk.counts[1:]) == {talk.counts[1]}
    talk.retry(answer)
    assert talk.counts[-1] == len(talk.ids(answer))
    talk.conversation.undo()
    talk.retry(answer)
    assert talk.counts[-1] == len(talk.ids(answer))


@pytest.mark.parametrize("part", [1, 2, 7, 13, 14])
def test_a_long_message_is_read_in_parts(vocab, part):
    """In the memory of one, and to the same state."""
    talk, lengths = Talk(vocab), []
    talk.model.prefill_tokens = part
    talk.model.base_model.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    for message in ("x", "the fox and the hen " * 3):
        lengths.clear()
        talk.say(message, [" a\n\n"])
        assert max(lengths) <= part
        talk.keep()
        check_state(talk)


@pytest.mark.parametrize("message", ["x", "xx", "xxx", "🙂"])
def test_a_prompt_may_be_a_token_or_one_token_again_and_again(vocab, message):
    talk = Talk(vocab)
    talk.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk.conversation = Conversation(talk.model, talk.tokenizer)
    for _ in range(3):
        assert talk.say(message, ["xx", 0]) == "xx"
        talk.keep()
        check_state(talk)


@pytest.mark.parametrize("name", ["world", "none", "chatml"])
def test_the_answers_are_those_of_the_whole_text(vocab, name):
    """Greedily; here with a token a byte, so that a text has the same tokens at once and in pieces."""
    talk = Talk(vocab, name, system="the rules")
    bytes_alone = vocab.with_name("bytes.txt")
    bytes_alone.write_text("".join(vocab.read_text().splitlines(keepends=True)[:256]))
    talk.tokenizer._tokenizer = RwkvTokenizer(bytes_alone).backend_tokenizer
    options = {"max_new_tokens": 9, "do_sample": False, "suppress_tokens": [0, 11, *range(129, 300)]}
    for message in ("a fox?", "a hen?", "why"):
        conversation = talk.conversation
        asked = [*conversation.messages, {"role": "user", "content": message}]
        ids = talk.tokenizer(conversation._render(asked, asks=True), return_tensors="pt").input_ids
        whole = talk.model.generate(ids, stop_strings=None, **options)
        answer = conversation.say(message, **options)
        assert answer == talk.tokenizer.decode(whole[0, ids.shape[1] :]).strip()


# Going back


def test_undo_and_retry_go_back_to_the_states_that_were(vocab):
    talk = Talk(vocab, system="the rules")
    conversation, points = talk.conversation, []
    for i in range(4):
        points.append(snapshot(conversation))
        talk.say(f"the {i}", [f" a {i}\n\n"])
    last = snapshot(conversation)
    assert talk.retry([" another\n\n"]) == "another" and conversation.messages[-1]["content"] == "another"
    assert talk.retry([" a 3\n\n"]) == "a 3"
    same_snapshot(snapshot(conversation), last)
    for i in reversed(range(4)):
        assert conversation.undo() == f"the {i}"
        same_snapshot(snapshot(conversation), points[i])
        if i == 2:
            talk.say("the 2", [" something else"])
            assert conversation.undo() == "the 2"
    for nothing in (conversation.undo, conversation.retry):
        with pytest.raises(ValueError, match="say something first"):
            nothing()


def test_reset_begins_again_with_the_system_message(vocab):
    talk = Talk(vocab, system="the rules")
    new = snapshot(talk.conversation)
    talk.say("the fox?", [" a\n\n"])
    talk.conversation.reset()
    same_snapshot(snapshot(talk.conversation), new)
    assert talk.conversation.messages == [{"role": "system", "content": "the rules"}]
    with pytest.raises(ValueError, match="nothing here to undo"):
        talk.conversation.undo()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_answer_that_is_broken_off_counts_as_far_as_it_was_written(vocab, error, after):
    talk, pieces = Talk(vocab), []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == after:
            raise error

    talk.say("the fox?", [" a\n\n"])
    talk.keep()
    with pytest.raises(error):
        talk.say("the hen?", [" the end of it\n\n"], write)
    talk.keep()
    check_state(talk)
    assert talk.conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces).strip()}
    talk.say("why", [" a\n\n"])
    talk.keep()
    check_state(talk)


def test_what_fails_before_the_answer_changes_nothing(vocab):
    talk = Talk(vocab)
    talk.say("the fox?", [" a\n\n"])
    before = snapshot(talk.conversation)

    def fail(*args):
        raise Stopped

    hook = talk.model.base_model.register_forward_pre_hook(fail)
    for method in (lambda: talk.say("the hen?", [" a"]), lambda: talk.retry([" a"])):
        with pytest.raises(Stopped):
            method()
        same_snapshot(snapshot(talk.conversation), before)
    hook.remove()
    assert talk.conversation.undo() == "the fox?"


def test_a_talk_begins_with_the_state_of_the_model(vocab):
    talk, plain = Talk(vocab), Talk(vocab)
    with torch.no_grad():
        state = plain.model(torch.tensor([[5, 6, 7]])).past_key_values
    talk.model.set_initial_state(state)
    for each in (talk, plain):
        each.say("the fox?", [" a\n\n"])
    with torch.no_grad():
        read = torch.tensor([[*plain.kept, *plain.keep()]])
        expected = plain.model(read, past_key_values=state).past_key_values
    agree(contents(talk.conversation.place.state), contents(expected))


# Templates that do not fit


FORGETS = "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
REWRITES = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('=')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)


def test_a_template_that_changes_what_was_said_is_refused(vocab):
    talk = Talk(vocab)
    for template in (FORGETS, "{{ messages | length }} messages" + CHATML):
        talk.tokenizer.chat_template = template
        with pytest.raises(ValueError, match="changes what was said before"):
            Conversation(talk.model, talk.tokenizer)


def test_a_template_that_changes_an_answer_is_refused_when_it_does(vocab):
    talk = Talk(vocab)
    talk.tokenizer.chat_template = REWRITES
    talk.conversation = Conversation(talk.model, talk.tokenizer)
    talk.say("why", ["the\n\n"])
    talk.say("why", ["because=the\n\n"])
    before = snapshot(talk.conversation)
    with pytest.raises(ValueError, match="changes what was said before"):
        talk.say("why", ["the\n\n"])
    same_snapshot(snapshot(talk.conversation), before)
    assert talk.conversation.undo() == "why"
    talk.say("why", ["the\n\n"])


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_template_may_be_chosen(vocab, name):
    """With its stop strings, whatever the tokenizer's is; and text that spells a special token is text."""
    said = "the <|rwkv_tokenizer_end_of_text|>"
    named, chosen = Talk(vocab, name), Talk(vocab, "chatml", template=name)
    for talk in (named, chosen):
        assert talk.say(said, [" the end.\n\n# Instruction:"]) == "the end."
    assert chosen.conversation.place.text == named.conversation.place.text
    assert 0 in named.conversation._turns[0].ids and 0 not in chosen.conversation._turns[0].ids
    with pytest.raises(ValueError, match=r"'chatty': choose world, raven, instruct"):
        Conversation(named.model, named.tokenizer, template="chatty")


def test_a_template_may_refuse(vocab):
    talk = Talk(vocab)
    talk.tokenizer.chat_template = "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + CHATML
    with pytest.raises(ValueError, match="refuses the messages: no system here"):
        Conversation(talk.model, talk.tokenizer, system="the rules")
    assert Conversation(talk.model, talk.tokenizer).say("why", max_new_tokens=2) is not None
    talk.tokenizer.chat_template = "{{ 'User: ' + messages }}"
    with pytest.raises(ValueError, match="refuses the messages"):
        Conversation(talk.model, talk.tokenizer)
