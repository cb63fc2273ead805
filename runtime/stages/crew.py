"""One model in many processes, asked by one: rank 0 leads, the others follow, in any layout."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainwright.runtime.errors import Diverged
from trainwright.runtime.megatron import loop
from trainwright.runtime.megatron.checkpoint import load_weights
from trainwright.runtime.megatron.loop import Score
from trainwright.runtime.megatron.model import Model
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.megatron.parallel import data_rank

ROWS_AT_ONCE = 16  # of each data rank: bounds what is sent and held, and is how often progress is told


class Crew:
    """Rank 0's end. The other ranks `follow` until `dismiss`."""

    def __init__(self, model: Model, row_tokens: int, tick: Callable[[int], None]) -> None:
        """`row_tokens`: length of a packed row; `tick` is told how many sequences have been answered since the last time."""
        self._model, self._row_tokens, self._tick = model, row_tokens, tick
        self._known: dict[Tokens, Score] = {}  # of the loaded model: some measures ask the same

    def load(self, folder: Path) -> None:
        """Put a checkpoint's weights into the model. Raises CheckpointError, on every rank."""
        self._known.clear()
        _tell(("load", folder))
        load_weights(self._model, folder)

    def ask(self, sequences: Sequence[Tokens], *, greedy: bool = False) -> list[Score]:
        """Log-probabilities of the counted tokens of each sequence; with `greedy`, also whether each of them is the likeliest."""
        known: dict[Tokens, Score] = {} if greedy else self._known
        unknown = list(dict.fromkeys(sequence for sequence in sequences if sequence not in known))
        for part in _parts(unknown, self._row_tokens * ROWS_AT_ONCE * data_rank()[1]):
            _tell(("score", part, greedy))
            known.update(zip(part, _score(self._model, part, self._row_tokens, greedy), strict=True))
            self._tick(len(part))
        self._tick(len(sequences) - len(unknown))
        return [known[sequence] for sequence in sequences]

    def dismiss(self) -> None:
        """Let the other ranks go on after `follow`."""
        _tell(("dismiss",))


def follow(model: Model, row_tokens: int) -> None:
    """Do what rank 0's Crew asks for, until it dismisses this rank."""
    while True:
        match _tell(None):
            case ("load", folder):
                load_weights(model, folder)
            case ("score", sequences, greedy):
                _score(model, sequences, row_tokens, greedy)
            case _:
                return


def _score(model: Model, sequences: list[Tokens], row_tokens: int, greedy: bool) -> list[Score]:
    scores = loop.score_sequences(model, sequences, row_tokens=row_tokens, greedy=greedy)
    if not all(math.isfinite(score.log_probability) for score in scores):  # on every rank, or none
        raise Diverged("the model's log-probabilities are no numbers: its weights are damaged; train it again")
    return scores


def _tell(message: Any) -> Any:
    """Rank 0's message, on every rank."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _parts(sequences: Sequence[Tokens], most_tokens: int) -> list[list[Tokens]]:
    """The sequences in order, in parts of about `most_tokens`."""
    parts: list[list[Tokens]] = []
    room = 0
    for sequence in sequences:
        if len(sequence.tokens) > room:
            parts.append([])
            room = most_tokens
        parts[-1].append(sequence)
        room -= len(sequence.tokens)
    return parts
