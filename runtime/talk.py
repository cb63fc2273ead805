"""Turns with a model: the tokens that it reads, what is forgotten when its context is full, its answer piece by piece."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages.record_types import Message

if TYPE_CHECKING:
    from trainwright.runtime.megatron.generate import CachedModel
    from trainwright.runtime.stages.chat import ChatTokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to while some of its bytes are still to come


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen."""

    temperature: float  # 0: the likeliest token
    top_k: int  # among so many; 0: among all
    max_tokens: int  # of an answer
    seed: int


class Speaker:
    """A model that answers to token ids. The seed decides its answers, in their order."""

    def __init__(self, model: "CachedModel", choice: Choice) -> None:
        import torch

        self._model, self._choice = model, choice
        self._generator = torch.Generator().manual_seed(choice.seed)

    @property
    def most_read(self) -> int:
        """Tokens that a prompt may have: at least half of the context is left to it."""
        return self._model.max_tokens - min(self._choice.max_tokens, self._model.max_tokens // 2)

    def answer(self, prompt: Sequence[int], ends: Sequence[int]) -> Iterator[int]:
        """The tokens of an answer, before one of `ends`; fewer than were asked for where the context is full."""
        from trainwright.runtime.megatron.generate import generate

        room = self._model.max_tokens - len(prompt) + 1  # the last token is chosen, and not read
        return generate(
            self._model.next_logits,
            prompt,
            num_tokens=min(self._choice.max_tokens, room),
            ends=ends,
            temperature=self._choice.temperature,
            top_k=self._choice.top_k,
            generator=self._generator,
        )


class Talk:
    """A conversation by the model's chat template. `note` takes what the user should know besides the answer."""

    def __init__(
        self, speaker: Speaker, words: "ChatTokenizer", note: Callable[[str], None], *, system: str = ""
    ) -> None:
        self._speaker, self._words, self._note = speaker, words, note
        self._system = [Message("system", system)] if system else []
        self._turns: list[Message] = []  # user and assistant in turn

    def reset(self) -> None:
        """Forget all turns."""
        self._turns = []

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer, in pieces of text. What of it was taken belongs to the conversation, also when the rest is not."""
        prompt = self._fit([*self._turns, Message("user", text)])
        stream = TextStream(self._words.decode)
        try:
            for token in self._speaker.answer(prompt, (self._words.end_of_turn, self._words.end_of_text)):
                yield stream.add(token)
            yield stream.finish()
        finally:
            self._turns.append(Message("assistant", stream.text))

    def _fit(self, turns: list[Message]) -> Sequence[int]:
        """The tokens of these turns; the oldest are forgotten until they fit. Raises DataError where the last alone does not."""
        forgotten = 0
        while len(prompt := self._words.prompt([*self._system, *turns])) > self._speaker.most_read:
            if len(turns) == 1:
                raise DataError(
                    f"the message takes {len(prompt)} tokens with all that belongs to it, and the model reads "
                    f"{self._speaker.most_read} before an answer: say it shorter, or ask for a shorter answer (--max-tokens)"
                )
            del turns[:2]
            forgotten += 1
        if forgotten:
            self._note(
                f"the context is full: forgot the {'oldest turn' if forgotten == 1 else f'{forgotten} oldest turns'}"
            )
        self._turns = turns
        return prompt


class Continuation:
    """Texts that a model without chat template continues, each by itself."""

    def __init__(self, speaker: Speaker, words: "ChatTokenizer", note: Callable[[str], None]) -> None:
        self._speaker, self._words, self._note = speaker, words, note

    def reset(self) -> None:
        """Nothing to forget."""

    def ask(self, text: str) -> Generator[str, None, None]:
        """How the text goes on, in pieces."""
        tokens = [self._words.end_of_text, *self._words.encode_text(text)]
        if len(tokens) > self._speaker.most_read:
            self._note(f"of {len(tokens)} tokens, the model reads the last {self._speaker.most_read}")
            tokens = tokens[-self._speaker.most_read :]
        stream = TextStream(self._words.decode)
        for token in self._speaker.answer(tokens, (self._words.end_of_text,)):
            yield stream.add(token)
        yield stream.finish()


class TextStream:
    """Text from tokens as they come: a character is given out when its last byte has come."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self.text = ""  # given out so far

    def add(self, token: int) -> str:
        """What is new and certain with this token; may be nothing."""
        self._tokens.append(token)
        return self._give(self._decode(self._tokens).removesuffix(UNFINISHED))

    def finish(self) -> str:
        """What was held back, bytes that are no character included."""
        return self._give(self._decode(self._tokens))

    def _give(self, certain: str) -> str:
        new = certain[len(self.text) :]
        self.text += new
        return new
