"""lm-evaluation-harness asks, this runtime's own forward pass answers: no export, any layout, no network.

Rank 0 alone imports this module, and late: it reads its environment variables as it is imported.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

# Before anything of Hugging Face is imported: what is not on this machine is an error, and nobody is told of a run.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import lm_eval.api.task
import numpy as np
from datasets import disable_progress_bars
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.stages.chat import ChatTokenizer
from trainwright.runtime.stages.intervals import Array, Items
from trainwright.runtime.stages.measures import Ask, Measure, Metric, Values
from trainwright.runtime.stages.records import Message

disable_progress_bars()
lm_eval.api.task.tqdm = lambda items, **settings: items  # a log is no terminal


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model as lm-eval sees one: text in, log-likelihoods out.

    `limit` is the longest sequence in tokens; of a longer one the beginning is left out, as in lm-eval's own models, and
    `cut` counts it.
    """

    def __init__(self, ask: Ask, chat: ChatTokenizer, *, limit: int) -> None:
        super().__init__()
        self.cut = 0
        self._ask, self._chat, self._limit = ask, chat, limit

    @property
    def eot_token_id(self) -> int:
        return self._chat.end_of_text

    @property
    def tokenizer_name(self) -> str:
        """Names caches of requests, which are not used."""
        return ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
        """Token ids of a text; what looks like a special token is one, because the template's marks are."""
        return self._chat.encode_text(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        return self._chat.render(messages, generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats of the continuation, whether greedy decoding would write it) of (context, continuation)."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each whole text, after an end-of-text; a long one in windows that overlap."""
        texts = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._ask([window for windows in texts for window in windows]))
        return [sum(next(scores).log_probability for _ in windows) for windows in texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Raises Unsupported."""
        raise Unsupported(
            "a task of lm-eval with output_type generate_until needs generated text, which this evaluation does not make: "
            "tasks with output_type multiple_choice work"
        )

    def _windows(self, text: str) -> Iterator[Tokens]:
        tokens = self._chat.encode_text(text)
        for pair in get_rolling_token_windows(
            tokens, self._chat.end_of_text, max_seq_len=self._limit - 1, context_len=1
        ):
            yield _tokens(*make_disjoint_window(pair))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both. Where the context's tokens are how the whole begins, that is the border, also after white space,
        such as a chat template's line feed; else lm-eval's rule: white space at the border belongs to the continuation."""
        whole, begin = self._chat.encode_text(context + continuation), self._chat.encode_text(context)
        if whole[: len(begin)] == begin:
            return begin, whole[len(begin) :]
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(self, requests: Sequence[Any], **settings: Any) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            whole = _tokens(context, continuation)
            self.cut += len(whole.tokens) > self._limit
            sequences.append(Tokens(whole.tokens[-self._limit :], (0, *whole.counts[-self._limit :][1:])))
        return [(score.log_probability, score.is_greedy) for score in self._ask(sequences, greedy=True)]


def measure_task(
    name: str, task: ConfigurableTask, ids: Sequence[str], chat: ChatTokenizer, *, apply_template: bool, context: int
) -> Measure:
    """`accuracy/<name>`: lm-eval's acc_norm, the share of items whose right answer has the highest log-likelihood per character;
    `accuracy_unnormalised/<name>`: its acc, by the log-likelihood alone. `context`: the model's, in tokens."""
    names = {f"accuracy/{name}": "acc_norm", f"accuracy_unnormalised/{name}": "acc"}
    choices = [len(task.doc_to_choice(doc)) for doc in task.eval_docs]
    items, chance = Items(np.ones(len(ids))), float(np.mean([1 / count for count in choices]))
    counts = {"questions": len(ids)}

    def values(ask: Ask) -> Values:
        model = HarnessModel(ask, chat, limit=context + 1)
        found = _ask(model, name, task, apply_template)
        counts["answers whose question was cut"] = model.cut
        return {metric: found[key] for metric, key in names.items()}

    return Measure(
        [Metric(one, "questions", ids, items, higher_is_better=True, is_share=True, chance=chance) for one in names],
        sum(choices),
        counts,
        values,
    )


def _ask(model: HarnessModel, name: str, task: ConfigurableTask, apply_template: bool) -> dict[str, Array]:
    """lm-eval's metrics of each item, in the task's order."""
    results = evaluator.evaluate(
        model,
        {"tasks": {name: task}},
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=apply_template,
        fewshot_as_multiturn=apply_template,
    )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return {key: np.array([float(sample[key]) for sample in samples]) for key in ("acc", "acc_norm")}


def _tokens(context: Sequence[int], continuation: Sequence[int]) -> Tokens:
    return Tokens((*context, *continuation), (*[0] * len(context), *[1] * len(continuation)))
