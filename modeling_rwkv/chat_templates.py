r"""How RWKV-4 models write conversations, as chat templates of transformers, and where an answer ends.

| name       | models                            | a conversation is written as                                 |
|------------|-----------------------------------|--------------------------------------------------------------|
| `world`    | World; and any fine-tuned to it   | `System: ...\n\nUser: ...\n\nAssistant: ...\n\n`             |
| `raven`    | Raven, for talk                   | `...\n\nBob: ...\n\nAlice: ...\n\n`, the system message bare |
| `instruct` | Raven, for one instruction a time | `Below is ...\n\n# Instruction:\n...\n\n# Response:\n...`    |

These are the forms of BlinkDL's own programs (ChatRWKV). There a blank line ends a turn, and generation; so that none
is left inside a message, each is stripped and runs of line breaks become one, as ChatRWKV does with what a person
types, and as the World models' card asks for the training data. Only an answer to an instruction keeps its blank
lines; the system message of `instruct` takes the place of its first sentences.
"""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """What `chat_template.jinja` and `generation_config.json` hold."""

    text: str  # Jinja, for `apply_chat_template`
    stop_strings: tuple[str, ...]  # an answer ends before the first of these, or at the end of text


_PARTS = {
    "CHECK_MESSAGE": r"""
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {%- set role = message.role | string | tojson -%}
        {{- raise_exception("the role is " ~ role ~ ": write system, user or assistant") -}}
    {%- endif -%}
    {%- if message.content is not string -%}
        {{- raise_exception("the content is " ~ (message.content | pprint)[:60] ~ ": write text") -}}
    {%- endif -%}""",
    "ONE_PARAGRAPH": r"""(message.content.replace("\r\n", "\n").strip().split("\n") | select | join("\n"))""",
    "PREAMBLE": json.dumps(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    ),
}
_TURNS = r"""{%- set names = NAMES -%}
{%- for message in messages -%}
    CHECK_MESSAGE
    {%- if message.role == "assistant" -%}
        {{- names.assistant -}}
        {%- generation -%}
            {{- (" " ~ ONE_PARAGRAPH).rstrip() ~ "\n\n" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- (names[message.role] ~ " " ~ ONE_PARAGRAPH).strip() ~ "\n\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- names.assistant -}}
{%- endif -%}
"""
_INSTRUCT = r"""{%- if not messages or messages[0].role != "system" -%}
    {{- PREAMBLE -}}
{%- endif -%}
{%- for message in messages -%}
    CHECK_MESSAGE
    {%- if message.role == "assistant" -%}
        {{- "# Response:\n" -}}
        {%- generation -%}
            {{- message.content.replace("\r\n", "\n").strip().removesuffix("# Instruction:").strip() ~ "\n\n" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- ("# Instruction:\n" if message.role == "user" else "") ~ ONE_PARAGRAPH ~ "\n\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "# Response:\n" -}}
{%- endif -%}
"""


def _filled(template: str, **parts: str) -> str:
    for name, text in (_PARTS | parts).items():
        template = template.replace(name, text)
    return template


def _turns(system: str, user: str, assistant: str) -> str:
    return _filled(_TURNS, NAMES=json.dumps({"system": system, "user": user, "assistant": assistant}))


CHAT_TEMPLATES = {
    "world": ChatTemplate(_turns("System:", "User:", "Assistant:"), ("\n\n",)),
    "raven": ChatTemplate(_turns("", "Bob:", "Alice:"), ("\n\n",)),
    "instruct": ChatTemplate(_filled(_INSTRUCT), ("\n\n# Instruction:",)),
}
