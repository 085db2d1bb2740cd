"""Talks in files: they go on where they were, and only with the model and the template that they are of."""

import json

import pytest
from talks import Talk, same_snapshot, small_vocabulary, snapshot  # noqa: F401 - a fixture

from modeling_rwkv import RwkvCache
from modeling_rwkv.cache import saved_notes


def test_a_saved_talk_goes_on(vocab, tmp_path):
    talk, path = Talk(vocab, system="the rules"), tmp_path / "talk"
    with pytest.raises(ValueError, match="nothing has been said"):
        talk.conversation.save(path)
    talk.say("the 狐狸?", [" a\n\n"])
    talk.say("the hen?", [" the end.\n\n"])
    talk.conversation.save(path)
    other = Talk(vocab, system="other rules")
    other.say("the hen", [" a\n\n"])
    other.conversation.load(path)
    same_snapshot(snapshot(other.conversation), snapshot(talk.conversation))
    with pytest.raises(ValueError, match="nothing here to undo"):
        other.conversation.undo()
    for each in (talk, other):
        each.say("why", [" the fox\n\n"])
    same_snapshot(snapshot(other.conversation), snapshot(talk.conversation))
    for each in (talk, other):
        each.conversation.reset()
    same_snapshot(snapshot(other.conversation), snapshot(talk.conversation))
    assert RwkvCache.load(path, model=talk.model).seen_tokens > 0
    assert json.loads(saved_notes(path)["conversation"])["messages"][1]["content"] == "the 狐狸?"


@pytest.mark.parametrize("kind", ["a text", "a state"])
def test_only_a_talk_is_overwritten(vocab, tmp_path, kind):
    talk, path = Talk(vocab), tmp_path / "talk"
    talk.say("the fox?", [" a\n\n"])
    talk.conversation.save(path)
    talk.conversation.save(path)
    path.write_bytes(b"weights") if kind == "a text" else rewritten(path, None)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="choose another name"):
        talk.conversation.save(path)
    assert path.read_bytes() == before


def rewritten(path, note):
    RwkvCache.load(path).save(path, notes={} if note is None else {"conversation": note})


REFUSED = {  # what was saved: what is said
    "another model's": "another model of these sizes",
    "a state": "holds a state but no conversation",
    "another template's": "another chat template",
    "a later format's": "format 2",
    "not JSON": "damaged",
    "something else": "damaged",
    "a text": "not a saved RwkvCache",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_file_is_refused_and_changes_nothing(vocab, tmp_path, kind):
    path = tmp_path / "talk"
    saved = Talk(vocab, "raven" if kind == "another template's" else "world", seed=int(kind == "another model's"))
    saved.say("the fox?", [" a\n\n"])
    saved.conversation.save(path)
    notes = {"a state": None, "a later format's": '{"version": 2}', "not JSON": "{", "something else": "[]"}
    if kind in notes:
        rewritten(path, notes[kind])
    if kind == "a text":
        path.write_text("User: the fox?")
    talk = Talk(vocab)
    talk.say("the hen", [" a\n\n"])
    before = snapshot(talk.conversation)
    with pytest.raises(ValueError, match=REFUSED[kind]):
        talk.conversation.load(path)
    with pytest.raises(FileNotFoundError):
        talk.conversation.load(tmp_path / "nothing")
    same_snapshot(snapshot(talk.conversation), before)
    assert talk.conversation.undo() == "the hen"
