"""The JSON objects that are read as records, and what is wrong with those that are not.

conversation  {"messages": [{"role", "content"}, ...]}, also ShareGPT's {"conversations": [{"from", "value"}, ...]} (and its
              "system") and {"prompt", "completion"}
preference    {"prompt", "chosen", "rejected"}, each a text or a list of messages, as in TRL; where the answers are whole
              conversations, the prompt may be left out: it is how both begin. "kind" may name the sort of rejected answer
question      {"query", "choices": [...], "answer": 0}

Each may have "id", and "group" (or {"metadata": {"group"}}): what must not be divided between splits.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from trainwright.runtime.stages.connectors import JsonLine, id_of, metadata_of
from trainwright.runtime.stages.record_types import ROLES, Conversation, Message, Preference, Question

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # its other names are the usual ones
SHOWN_CHARACTERS = 40  # of a wrong value in a reason


class Unusable(Exception):
    """A record that cannot be used; the message is the reason, under which such records are counted."""


def parse_conversation(line: JsonLine) -> Conversation:
    """Raises Unusable."""
    record = _object(line)
    if "messages" in record:
        messages = _messages(record["messages"])
    elif "conversations" in record:
        messages = _sharegpt(record)
    elif "prompt" in record and "completion" in record:
        messages = (*_turns(record["prompt"], "user"), *_turns(record["completion"], "assistant"))
    else:
        raise Unusable(f'no "messages", "conversations", or "prompt" and "completion"; {_fields(record)}')
    _check_turns(messages)
    if messages[-1].role != "assistant":
        raise Unusable("the last turn is not the assistant's")
    return Conversation(messages, id_of(line), _group(record))


def parse_preference(line: JsonLine) -> Preference:
    """Raises Unusable."""
    record = _object(line)
    if "chosen" not in record or "rejected" not in record:
        raise Unusable(f'no "chosen" and "rejected"; {_fields(record)}')
    chosen, rejected = (_turns(record[name], "assistant") for name in ("chosen", "rejected"))
    if "prompt" in record:
        prompt = _turns(record["prompt"], "user")
        chosen, rejected = _without(prompt, chosen), _without(prompt, rejected)
    else:
        prompt = _common(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise Unusable('no "prompt", and the answers have no common beginning that is one')
    if any([message.role for message in answer] != ["assistant"] for answer in (chosen, rejected)):
        raise Unusable("chosen and rejected are not one answer of the assistant's each")
    for answer in (chosen, rejected):
        _check_turns((*prompt, *answer))
    if chosen[0].content.strip() == rejected[0].content.strip():
        raise Unusable("chosen and rejected are identical")
    kind = record.get("kind")
    return Preference(
        prompt=prompt,
        chosen=chosen[0].content,
        rejected=rejected[0].content,
        kind=kind if isinstance(kind, str) else "",
        id=id_of(line),
        group=_group(record),
    )


def parse_question(line: JsonLine) -> Question:
    """Raises Unusable."""
    record = _object(line)
    query, choices, answer = (record.get(name) for name in ("query", "choices", "answer"))
    if any(name not in record for name in ("query", "choices", "answer")):
        raise Unusable(f'no "query", "choices" and "answer"; {_fields(record)}')
    if not isinstance(query, str) or not query.strip():
        raise Unusable('"query" is not a text')
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise Unusable('"choices" is not a list of texts')
    if len(choices) < 2:
        raise Unusable("fewer than two choices")
    if len({choice.strip() for choice in choices}) < len(choices):
        raise Unusable("a choice occurs twice")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise Unusable('"answer" is not the number of a choice')
    if not 0 <= answer < len(choices):
        raise Unusable("answer out of range: choices are numbered from 0")
    return Question(query, tuple(choices), answer, id_of(line), _group(record))


def _object(line: JsonLine) -> dict[str, Any]:
    if isinstance(line.value, list):
        raise Unusable("a JSON list: write one object a line")
    if not isinstance(line.value, dict):
        raise Unusable("no JSON object")
    return line.value


def _fields(record: dict[str, Any]) -> str:
    return f"its fields are {_shown(', '.join(record))}" if record else "it is empty"


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _group(record: dict[str, Any]) -> str | None:
    found = [group for group in (record.get("group"), metadata_of(record).get("group")) if group is not None]
    return str(found[0]) if found else None


def _turns(value: Any, role: str) -> tuple[Message, ...]:
    """A text as one message of `role`, or a list of messages."""
    return (Message(role, value),) if isinstance(value, str) else _messages(value)


def _sharegpt(record: dict[str, Any]) -> tuple[Message, ...]:
    turns = record["conversations"]
    if isinstance(turns, list):
        turns = [
            {"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
            if isinstance(turn, dict) and "from" in turn
            else turn
            for turn in turns
        ]
    system = record.get("system")
    first = (Message("system", system),) if isinstance(system, str) and system.strip() else ()
    return (*first, *_messages(turns))


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise Unusable("messages are neither a text nor a list")
    return tuple(_message(item) for item in value)


def _message(value: Any) -> Message:
    if not isinstance(value, dict) or "role" not in value or "content" not in value:
        raise Unusable('a message without "role" and "content"')
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise Unusable(f"unknown role {_shown(repr(role))}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise Unusable("a message whose content is not a text")
    return Message(role, content)


def _check_turns(messages: Sequence[Message]) -> None:
    """Raise Unusable unless user and assistant take turns, after at most one system message, and say something."""
    if not messages:
        raise Unusable("no messages")
    if any(not message.content.strip() for message in messages):
        raise Unusable("a message is empty")
    turns = messages[messages[0].role == "system" :]
    roles = [turn.role for turn in turns]
    if "system" in roles:
        raise Unusable("a system message after the first turn")
    if not roles or roles[0] != "user":
        raise Unusable("the first turn is not the user's")
    if "assistant" not in roles:
        raise Unusable("no turn of the assistant's")
    if any(role == next_role for role, next_role in pairwise(roles)):
        raise Unusable("two turns of one role in a row")


def _without(prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """`answer` without the prompt that some data sets repeat in it."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _common(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """How both begin, the last turn of either excepted."""
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    return chosen[:length]
