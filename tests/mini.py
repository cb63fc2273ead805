"""A project of all nine stages that runs in two minutes: spec, corpus, conversations, pairs and questions made of arithmetic."""

import json
from pathlib import Path

SPEC = """\
name: mini
model:
  family: llama
  shape: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2}
  context_length: 64
  vocab_size: 512
  precision: fp32
data:
  sources: [{name: docs, path: 'corpus/*.jsonl', filters: none}]
  tokens: 40960
training: {global_batch: 8 sequences, learning_rate: 5e-3, schedule: wsd, beta2: 0.95, weight_decay: 0.1}
compute: {device: cpu, nodes: 1, devices_per_node: 2}
stages:
  curate: {near_duplicates: 0.8}
  pretrain: {baseline: bigram}
  sft: {data: chat.jsonl, epochs: 2, global_batch: 8 sequences, learning_rate: 2e-3}
  dpo: {data: pairs.jsonl, epochs: 1, global_batch: 4 sequences, learning_rate: 5e-4, beta: 0.1, nll: 0.5}
  evaluate:
    compare: [pretrain, sft]
    tasks: {sums: {data: choices.jsonl}}
    gates: {perplexity: 400}
  export: {}
"""
WORDS = ("red", "blue", "green", "small", "large", "old", "new", "round", "flat", "warm", "cold", "loud")


def write_project(folder: Path) -> Path:
    """Write the mini project into `folder`; its spec's path."""
    (folder / "corpus").mkdir(parents=True)
    _write(folder / "corpus" / "docs.jsonl", ({"text": _text(n), "id": str(n)} for n in range(400)))
    _write(folder / "chat.jsonl", ({"messages": _turns(n)} for n in range(300)))
    pairs = (
        {"prompt": f"What is {n} plus {n + 3}?", "chosen": f"It is {2 * n + 3}.", "rejected": f"Blue {n}!"}
        for n in range(300)
    )
    _write(folder / "pairs.jsonl", pairs)
    _write(folder / "choices.jsonl", (_question(n) for n in range(200)))
    spec = folder / "spec.yaml"
    spec.write_text(SPEC)
    return spec


def _text(n: int) -> str:
    word, other = WORDS[n % len(WORDS)], WORDS[n * 7 % 11]
    lines = [
        f"{n + k} plus {n + k + 3} is {2 * (n + k) + 3}, said the {word} {other} clerk of house {n * 31 % 997}."
        for k in range(5)
    ]
    return "\n".join(lines)


def _turns(n: int) -> list[dict[str, str]]:
    turns = [("user", f"What is {n} plus {n + 3}?"), ("assistant", f"It is {2 * n + 3}.")]
    if n % 3 == 0:
        turns += [("user", f"And the square of {n}?"), ("assistant", f"That is {n * n}.")]
    return [{"role": role, "content": content} for role, content in turns]


def _question(n: int) -> dict[str, object]:
    right = 2 * n + 3
    choices = [f"It is {right}.", f"It is {right + 7}.", f"Blue {n}!", f"It was {WORDS[n % len(WORDS)]}."]
    place = n * 5 % 4
    choices[0], choices[place] = choices[place], choices[0]
    return {"query": f"What is {n} plus {n + 3}?", "choices": choices, "answer": place}


def _write(path: Path, records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))  # type: ignore[attr-defined]
