"""Does a Hugging Face folder compute what the trained model computes? It is loaded with `transformers`, as its users will.

Raises ExportMismatch at the first difference: of token ids, of special tokens, of logits.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.runtime.errors import ExportMismatch

# Prose, code, white space, and characters of one to four bytes of UTF-8.
TEXT = '''A model is read in two ways. Whoever trained it knows its weights by the names that the training gave them; whoever
uses it knows a folder, loads it, and asks. Between the two stands a translation, and most of what can go wrong in one goes wrong
without a sound: two projections are exchanged, a rotation turns the other way, a norm divides by another epsilon, and the
text still reads like text. It is only worse. That is why nobody should trust a translation that was not compared, number by
number, with the original.

def accumulate(values, start=0.0):
    """Return the running sums of an iterable of numbers.

    >>> accumulate([1, 2, 3])
    [1.0, 3.0, 6.0]
    """
    total, sums = start, []
    for value in values:
        if not isinstance(value, (int, float)):
            raise TypeError(f"expected a number, got {type(value).__name__!r}")
        total += value
        sums.append(total)
    return sums


class Account:
\t"""Tabs,  double  spaces, and a line that ends in a carriage return.\r
\t"""
\tdef __init__(self, owner: str, *, balance: int = 1_000_000) -> None:
\t\tself._owner, self.balance = owner, balance & 0xFF | 0b1010

Größe, naïveté, œuvre; Ελληνικά, русский, עברית, العربية, हिन्दी; 日本語と中文、한국어.
Prices: 3,50 € or £2.99; 6 × 7 = 42, ∑ ≥ ∫. 🙂🚀👩‍🔬
The quick brown fox, 0123456789 times: !"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ and the end.   '''
CONVERSATION = (
    ("user", "What does this function do?\n\ndef first(items):\n    return next(iter(items), None)"),
    ("assistant", "Return the first item of an iterable, or None if it is empty."),
    ("user", "And when the items are a dictionary?"),
    ("assistant", "Iterating over a dictionary gives its keys: the first key that was inserted."),
)


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens that both models read, and the trained model's logits after each."""

    name: str
    first: int  # place of the first token in what `name` names
    tokens: tuple[int, ...]
    logits: Tensor  # float32 [tokens, vocabulary], on the CPU


def open_transformers() -> Any:
    """The module, silent and offline."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(variable, "1")
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def check_tokens(
    folder: Path, *, text: Sequence[int], conversation: tuple[Sequence[int], Sequence[int]] | None
) -> None:
    """Compare the ids of TEXT, and of CONVERSATION (whole; and without its last answer, ready to be answered) where there
    is a chat template."""
    tokenizer = open_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    _check_ids("the text", tokenizer(TEXT)["input_ids"], text)
    if conversation is None:
        return
    messages = [{"role": role, "content": content} for role, content in CONVERSATION]
    whole, prompt = conversation
    _check_ids("the conversation", tokenizer.apply_chat_template(messages, return_dict=False), whole)
    ready = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    _check_ids("the prompt", ready, prompt)


def check_logits(folder: Path, passages: Sequence[Passage], tolerance: float, device: torch.device) -> float:
    """Compare logits, in fp32, over all passages. Returns the largest absolute difference."""
    model = open_transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.to(device).eval()
    worst = 0.0
    for passage in passages:
        with torch.inference_mode():
            theirs = model(torch.tensor([passage.tokens], device=device)).logits[0].float().cpu()
        if theirs.shape != passage.logits.shape:
            raise ExportMismatch(
                f"{_refused(folder)}: its logits have the shape {tuple(theirs.shape)}, not {tuple(passage.logits.shape)}"
            )
        distances = (theirs - passage.logits).abs().nan_to_num(nan=torch.inf)
        largest = float(distances.max())
        if largest > tolerance:
            place, token = divmod(int(distances.argmax()), distances.shape[1])
            exported, trained = float(theirs[place, token]), float(passage.logits[place, token])
            raise ExportMismatch(
                f"{_refused(folder)}: logits differ by {largest:.2g}, and the tolerance is {tolerance:g}; the worst is after "
                f"token {passage.first + place} of {passage.name}, for the id {token}: "
                f"{exported:.6g} exported, {trained:.6g} trained"
            )
        worst = max(worst, largest)
    return worst


def _check_ids(what: str, theirs: Sequence[int], ours: Sequence[int]) -> None:
    theirs, ours = list(theirs), list(ours)
    if theirs == ours:
        return
    place = next(
        (i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), min(len(theirs), len(ours))
    )
    raise ExportMismatch(
        f"the exported tokenizer reads {what} differently from token {place} on: {theirs[place : place + 5]} exported, "
        f"{ours[place : place + 5]} in training ({len(theirs)} and {len(ours)} tokens)"
    )


def _refused(folder: Path) -> str:
    return f"the exported model is not the trained one (it stays in {folder.name}/ to be looked at)"
