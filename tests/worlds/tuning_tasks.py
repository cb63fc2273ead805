"""What tuning stages train on, small: sequences of unlike lengths and counts, alone, packed, and as pairs of answers."""

import torch
from torch import Tensor
from world_support import SEQUENCE, VOCABULARY, Task

from trainwright.runtime.megatron import losses
from trainwright.runtime.megatron.packing import Sequence, packed_row

ROWS = 4  # micro-batches of a global batch
ROW = 2 * SEQUENCE + 1  # odd: tensor ranks cannot share it evenly
PAD = 3
BETA, NLL = 0.1, 0.5


def sequence(generator: torch.Generator, longest: int = SEQUENCE + 1) -> Sequence:
    """4 to `longest` tokens around the whole vocabulary, of which the last and about half of the others count."""
    length = int(torch.randint(4, longest + 1, (), generator=generator))
    start = torch.randint(0, VOCABULARY, (1,), generator=generator)
    strides = torch.randint(1, 5, (length - 1,), generator=generator) * 7
    tokens = torch.cat([start, strides]).cumsum(0) % VOCABULARY
    counts = torch.randint(0, 2, (length,), generator=generator)
    counts[0], counts[-1] = 0, 1
    return Sequence(tuple(tokens.tolist()), tuple(counts.tolist()))


def rows(step: int) -> list[list[Sequence]]:
    """The sequences of each row of a global batch. The rows hold unlike numbers of targets; the last of step 1 holds none."""
    generator = torch.Generator().manual_seed(500 + step)
    held: list[list[Sequence]] = []
    for row in range(ROWS):
        held.append([])
        while not (step == 1 and row == ROWS - 1):
            item = sequence(generator)
            if sum(other.positions for other in held[-1]) + item.positions > ROW - 16 * row:
                break
            held[-1].append(item)
    return held


def pairs(step: int) -> list[list[Sequence]]:
    """As `rows`, of an even number of sequences each: chosen and rejected in turn. Row 2 is full to the last position."""
    held = [row[: len(row) // 2 * 2] for row in rows(step)]
    generator = torch.Generator().manual_seed(900 + step)
    whole = [sequence(generator, longest=4), sequence(generator, longest=4)]
    missing = ROW - sum(item.positions for item in whole)
    whole += [Sequence(tuple(range(size + 1)), (0,) * size + (1,)) for size in (missing // 2, missing - missing // 2)]
    held[2] = whole
    return held


def reference(items: list[Sequence]) -> list[float]:
    """Log-probabilities under some other model: about ln(vocabulary) a token."""
    return [-(5.0 + 0.1 * (sum(item.tokens) % 7)) * sum(item.counts) for item in items]


def packed(step: int, data_rank: int, data_size: int) -> list[dict[str, Tensor]]:
    return [packed_row(items, ROW, PAD) for items in rows(step)[data_rank::data_size]]


def padded(step: int, data_rank: int, data_size: int) -> list[dict[str, Tensor]]:
    """The sequences of `packed`, each in a row of its own."""
    alone = [packed_row([item], SEQUENCE, PAD) for items in rows(step) for item in items]
    both = {name: torch.cat([row[name] for row in alone]) for name in alone[0] if name != "segments"}
    both["position_ids"] = torch.arange(SEQUENCE).repeat(len(alone), 1)
    return [both]


def paired(step: int, data_rank: int, data_size: int) -> list[dict[str, Tensor]]:
    batches = []
    for items in pairs(step)[data_rank::data_size]:
        row = packed_row(items, ROW, PAD)
        known = torch.full((1, row["segments"].numel()), torch.nan)  # of padding, what nobody may look at
        known[0, : len(items)] = torch.tensor(reference(items))
        batches.append({**row, "reference": known})
    return batches


PADDED = Task("padded", padded)  # in one process
PACKED = Task("packed", packed)
PAIRS = Task("pairs", paired, losses.preference_loss(beta=BETA, nll=NLL))
