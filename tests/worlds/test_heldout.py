"""What is measured on held-out text covers each token once, in every layout."""

import json
import math
from pathlib import Path

import pytest
import torch
from world_support import SEQUENCE, VOCABULARY, Case, build, run_reference, run_world

from trainwright.runtime.megatron.data import TokenFile
from trainwright.runtime.stages.heldout import BATCH_TOKENS, HeldOutText, score

WINDOWS = 2 * BATCH_TOKENS // SEQUENCE + 3  # three batches: two data ranks get unlike numbers
TOKENS = {"long": WINDOWS * SEQUENCE - 5, "short": 9, "none": 0}
BYTES_PER_TOKEN = 3


@pytest.fixture
def text(tmp_path: Path) -> HeldOutText:
    """What a tokenize stage leaves: random tokens, `TOKENS` of each source in every split."""
    generator = torch.Generator().manual_seed(3)
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        for source, count in TOKENS.items():
            if count:
                file = TokenFile(tmp_path / split / source, VOCABULARY)
                file.add_document(torch.randint(0, VOCABULARY, (count,), generator=generator).tolist())
                file.finish()
    summary = {
        "tokens": dict.fromkeys(("train", "validation", "test"), TOKENS),
        "bytes": {"test": {source: BYTES_PER_TOKEN * count for source, count in TOKENS.items()}},
        "vocab_size": VOCABULARY,
        "end_of_text": 0,
        "token_dtype": "uint16",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return HeldOutText(tmp_path, summary, tuple(TOKENS))


@pytest.mark.parametrize("case", [Case(data=2), Case(tensor=2)], ids=str)
def test_every_token_but_the_first_counts_once_in_every_layout(case: Case, text: HeldOutText) -> None:
    initial = run_reference(Case(steps=1)).initial

    def measure(which: Case) -> tuple[dict[str, tuple[float, int]], dict[str, float], dict[str, float]]:
        built = build(which, initial)
        windows = text.windows("test", SEQUENCE)
        scores = {source: score(built, held, range(held.num_windows), 2) for source, held in windows.items()}
        figures = text.test(built, micro_batch=2, baseline="bigram")
        return scores, figures, text.validate(built, sequences=1, micro_batch=2)

    [(scores, figures, validation)] = run_world(1, lambda: measure(Case()))
    assert {source: tokens for source, (_, tokens) in scores.items()} == {"long": TOKENS["long"] - 1, "short": 8}
    nats = sum(total for total, _ in scores.values())
    predicted = TOKENS["long"] - 1 + 8
    assert figures["test/perplexity"] == pytest.approx(math.exp(nats / predicted))
    num_bytes = BYTES_PER_TOKEN * (TOKENS["long"] + TOKENS["short"])
    assert figures["test/bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes)
    assert figures["bigram/bits_per_byte"] == pytest.approx(
        math.log2(figures["bigram/perplexity"]) * predicted / num_bytes
    ), "the bigram is measured on other tokens"
    assert set(validation) == {"validation/long", "validation/short", "validation_perplexity"}
    for ranks in run_world(case.layout.world_size, lambda: measure(case)):
        assert ranks[1] == pytest.approx(figures, rel=1e-5)
        assert ranks[2] == pytest.approx(validation, rel=1e-5)
