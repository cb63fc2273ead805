"""Conversations as tokens: a chat template (Jinja, rendered by Hugging Face), and which tokens are the assistant's.

The template says what a conversation looks like, and its {% generation %} marks what the assistant writes: the tokens between
them have mask 1. They must hold the end of turn as well, or a model never learns to stop.

A message that spells out a special token ("<|im_end|>") must not end a turn. Hugging Face would read it as the token. Here
`render` puts a mark into it, by which the tokenizer does not know it for one; what normalises the text before it is cut
into words takes the mark away. So the message keeps every character, and they are ordinary tokens.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.runtime.errors import DataError, Unsupported
from trainwright.runtime.reading import printable
from trainwright.runtime.stages.corpus import END_OF_TEXT
from trainwright.runtime.stages.record_types import Message

if TYPE_CHECKING:
    from trainwright.runtime.megatron.packing import Sequence as Tokens

PAD, END_OF_TURN = "<|pad|>", "<|im_end|>"

# ChatML. White space around a message goes: else the line feed before an answer and the answer's own could be one token, and
# a prompt's tokens not the beginning of the whole conversation's.
DEFAULT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content | trim + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- message.content | trim + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MARK = "\ufdd0"  # a noncharacter, for use within a program only: no text has it
SHOWN_CHARACTERS = 4000
MARKS_FIX = (
    "write, around what the assistant says and its end of turn: "
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
)
_SAMPLE = (
    Message("user", "First question?"),
    Message("assistant", "First answer."),
    Message("user", "Second question?"),
    Message("assistant", "Second answer."),
)


def read_template(path: Path) -> str:
    """A chat template. Raises DataError where the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"cannot read the chat template {path}: {reason}; leave chat_template out for the default"
        ) from error


class ChatTokenizer:
    """A tokenizer with a chat template. `pad`, `end_of_turn`, `end_of_text` are token ids."""

    def __init__(self, tokenizer_json: Path, template: str, name: str = "the chat template") -> None:
        """`name`: what messages call the template.

        Raises DataError where the tokenizer lacks a special token, or the template is none that one can be trained by.
        """
        from tokenizers import Tokenizer, normalizers
        from transformers import PreTrainedTokenizerFast  # takes seconds

        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        unmark = normalizers.Replace(MARK, "")
        own = self._tokenizer.normalizer
        self._tokenizer.normalizer = unmark if own is None else normalizers.Sequence([unmark, own])
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        for token in (END_OF_TEXT, PAD, END_OF_TURN):
            if token not in special:
                raise DataError(f"{tokenizer_json} has no special token {token}; it has {', '.join(special) or 'none'}")
        self._special = re.compile("|".join(map(re.escape, special)))
        self._chat = PreTrainedTokenizerFast(
            tokenizer_object=self._tokenizer, eos_token=END_OF_TURN, pad_token=PAD, chat_template=template
        )
        self.template, self._name = template, name
        ids = self._tokenizer.get_vocab()
        self.pad, self.end_of_text = ids[PAD], ids[END_OF_TEXT]
        self.end_of_turn = self._check()

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """(tokens, mask) of a conversation; mask 1: the assistant's, end of turn included. Raises DataError."""
        encoded = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], encoded["assistant_masks"]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of `messages` and of how an answer begins. Raises DataError."""
        return self.encode_text(self.render(messages, generation_prompt=True))

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The text of a conversation, for `encode_text`. Raises DataError."""
        text: str = self._apply(messages, tokenize=False, add_generation_prompt=generation_prompt)
        return text

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text in which special tokens are what they look like, but for those in messages that were rendered."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones spelt out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def spells_special_token(self, messages: Sequence[Message]) -> bool:
        """Whether a message has a text in it that would be a special token, had it not been marked."""
        return any(self._special.search(message.content) for message in messages)

    def _apply(self, messages: Sequence[Message], **settings: Any) -> Any:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": self._mark(message.content)} for message in messages]
        try:
            return self._chat.apply_chat_template(turns, **settings)
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            line = getattr(error, "lineno", None)
            where = f", line {line}" if line else ""
            raise DataError(f"{self._name}{where}: {error}; correct it, or leave it out for the default") from error

    def _mark(self, content: str) -> str:
        return self._special.sub(lambda found: found[0][0] + MARK + found[0][1:], content.replace(MARK, ""))

    def _check(self) -> int:
        """Look at the template's view of a sample; the token that ends the assistant's turns."""
        tokens, mask = self.encode(_SAMPLE)
        marked = [self.decode(run) for count, run in _runs(tokens, mask) if count]
        if not marked:
            raise DataError(f"{self._name} marks nothing as the assistant's; {MARKS_FIX}")
        questions, answers = ([message.content for message in _SAMPLE[begin::2]] for begin in (0, 1))
        for text in marked:
            if not any(answer in text for answer in answers) or any(question in text for question in questions):
                raise DataError(f"{self._name} marks {text!r}, which is not an answer of the assistant's; {MARKS_FIX}")
        last = {run[-1] for count, run in _runs(tokens, mask) if count}
        if len(last) > 1 or not self._special.fullmatch(self.decode(list(last))):
            raise DataError(
                f"{self._name} marks {marked[0]!r}, which does not end with a special token: a model would never learn "
                f"to end its turn; {MARKS_FIX}"
            )
        prompt = self.prompt(_SAMPLE[:-1])
        if tokens[: len(prompt)] != prompt or not any(mask[len(prompt) : len(prompt) + 1]):
            raise DataError(
                f"{self._name} asks for an answer by {self.decode(prompt)!r}, which is not all that stands before the "
                f"answer in {self.decode(tokens)!r}: a model would be asked in another way than it learns; write, at its end, "
                "how a turn of the assistant's begins: {% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
            )
        return last.pop()


def fit(
    chat: ChatTokenizer, messages: Sequence[Message], *, limit: int, too_long: str, counts: Counter[str]
) -> "list[Tokens]":
    """A conversation as sequences of at most `limit` tokens; `counts` says what became of it where it is longer.

    `too_long`: "drop" it; "truncate" keeps its beginning, if there is an answer in it; "split" cuts it between turns: each
    part begins with the system message, if any, and a question, and a question and answer that are too long are truncated.
    Raises Unsupported for another word, DataError where the template fails.
    """
    if too_long not in ("truncate", "drop", "split"):
        raise Unsupported(f"too_long={too_long!r} is unknown: write 'truncate', 'drop' or 'split'")
    if chat.spells_special_token(messages):
        counts["with a special token spelt out, read as text"] += 1
    tokens, mask = chat.encode(messages)
    if len(tokens) <= limit:
        return _sequences([(tokens, mask)])
    if too_long == "drop":
        counts["dropped, too long"] += 1
        return []
    if too_long == "truncate":
        return _sequences(_truncate(tokens, mask, limit, counts))
    counts["split"] += 1
    parts = [part for encoded in _split(chat, messages, limit) for part in _truncate(*encoded, limit, counts)]
    counts["parts of split ones"] += len(parts)
    return _sequences(parts)


def show(chat: ChatTokenizer, messages: Sequence[Message]) -> str:
    """The rendered conversation, for a log: [[what counts in the loss]] in brackets."""
    runs = _runs(*chat.encode(messages))
    text = "".join(f"[[{chat.decode(run)}]]" if count else chat.decode(run) for count, run in runs)
    return printable(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...").rstrip("\n")


def _split(chat: ChatTokenizer, messages: Sequence[Message], limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """As many questions and answers together as fit into `limit` tokens; one that does not fit by itself is longer."""
    system = list(messages[: messages[0].role == "system"])
    turns = messages[len(system) :]
    part: list[Message] = []
    encoded: tuple[list[int], list[int]] = [], []
    for begin in range(0, len(turns), 2):
        pair = turns[begin : begin + 2]
        longer = chat.encode([*system, *part, *pair])
        if part and len(longer[0]) > limit:
            yield encoded
            part, longer = [], chat.encode([*system, *pair])
        part, encoded = [*part, *pair], longer
    yield encoded


def _truncate(
    tokens: list[int], mask: list[int], limit: int, counts: Counter[str]
) -> list[tuple[list[int], list[int]]]:
    if len(tokens) <= limit:
        return [(tokens, mask)]
    if not sum(mask[:limit]):
        counts["dropped, the context ends before the answer"] += 1
        return []
    counts["truncated"] += 1
    return [(tokens[:limit], mask[:limit])]


def _sequences(parts: list[tuple[list[int], list[int]]]) -> "list[Tokens]":
    from trainwright.runtime.megatron.packing import Sequence as Tokens  # takes seconds

    return [Tokens(tuple(tokens), tuple(mask)) for tokens, mask in parts]


def _runs(tokens: Sequence[int], mask: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(mask, tokens) of each stretch with one mask."""
    for count, pairs in groupby(zip(mask, tokens, strict=True), key=lambda pair: pair[0]):
        yield count, [token for _, token in pairs]
