"""Preference records as token sequences: prompt and one answer each, of which only the answer counts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.stages.chat import ChatTokenizer
from trainwright.runtime.stages.records import Message, Preference


def tokenise(
    records: Iterable[Preference], chat: ChatTokenizer, limit: int, too_long: str, counts: Counter[str]
) -> Iterator[tuple[Tokens, Tokens]]:
    """(chosen, rejected) of every record that fits into `limit` tokens, or is cut to them where `too_long` is "truncate".

    A pair is dropped, and counted, where it is too long, or the cut leaves no answer or twice the same. Raises Unsupported for
    another word, DataError where the template fails.
    """
    if too_long not in ("truncate", "drop"):
        raise Unsupported(f"too_long={too_long!r} is unknown for pairs of answers: write 'truncate' or 'drop'")
    for record in records:
        chosen, rejected = (answer_tokens(chat, record.prompt, answer) for answer in (record.chosen, record.rejected))
        if max(len(chosen.tokens), len(rejected.tokens)) > limit:
            chosen, rejected = _cut(chosen, limit), _cut(rejected, limit)
            useless = not sum(chosen.counts) or not sum(rejected.counts) or chosen == rejected
            if too_long == "drop" or useless:
                counts["dropped, too long"] += 1
                continue
            counts["truncated"] += 1
        yield chosen, rejected


def answer_tokens(chat: ChatTokenizer, prompt: Sequence[Message], answer: str) -> Tokens:
    """The tokens of `prompt` and `answer`; only those after the prompt's generation mark count, the end of turn included."""
    tokens, mask = chat.encode([*prompt, Message("assistant", answer)])
    begin = len(chat.prompt(prompt))
    return Tokens(tuple(tokens), tuple(counts if place >= begin else 0 for place, counts in enumerate(mask)))


def _cut(answer: Tokens, limit: int) -> Tokens:
    return Tokens(answer.tokens[:limit], answer.counts[:limit])
