"""Writes a bundle whose models are trained, in seconds: `python saved_models.py FOLDER`. Megatron-Core and gloo are real.

work/sft        a tuned model that knows TALKS by heart, saved by two tensor-parallel processes, with a chat template
work/pretrain   its weights after one step, without a chat template
work/qwen       bf16, untied, normalised queries and keys, after one step, saved by two pipeline stages; no stage of the bundle
work/gpt, work/mixtral, work/deepseek    of other formats, after one step, saved by two tensor or expert ranks; no stages either
work/dpo        a stage of the bundle that has not run
"""

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "worlds"))
warnings.simplefilter("ignore")

import torch  # noqa: E402
from world_support import Case, literals, run_world  # noqa: E402

from trainwright.runtime.manifest import (  # noqa: E402
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Manifest,
    Stage,
    file_hash,
    program_identity,
    write_manifest,
)
from trainwright.runtime.megatron import loop, model, parallel  # noqa: E402
from trainwright.runtime.megatron.checkpoint import Checkpoints, Identity, ModelFiles  # noqa: E402
from trainwright.runtime.stages.chat import DEFAULT_TEMPLATE, ChatTokenizer  # noqa: E402
from trainwright.runtime.stages.record_types import Message  # noqa: E402
from trainwright.runtime.stages.tokenizer import train as train_tokenizer  # noqa: E402
from trainwright.runtime.workspace import write_json  # noqa: E402

RED, GREEN = (("user", "red"), ("assistant", "rot \N{ROSE}")), (("user", "green"), ("assistant", "grün \N{HERB}"))
RED_AGAIN, GREEN_AGAIN = ((("user", "again"), ("assistant", f"{colour}, wie gesagt")) for colour in ("rot", "grün"))
TALKS = (RED + RED_AGAIN, GREEN + GREEN_AGAIN, RED_AGAIN + GREEN)
SEQUENCE, STEPS = 96, 120
VOCABULARY, PADDED = 280, 384
# What its Hugging Face format has a place for: no prediction of further tokens, shared experts as wide as others.
DEEPSEEK = (("mtp_num_layers", None), ("moe_shared_expert_intermediate_size", 64))
FOLDER = Path(sys.argv[1]).resolve()
TOKENIZER = FOLDER / "tokenizer.json"


def train(case: Case, name: str, steps: int, template: str) -> None:
    """In each rank: a model of `case` after `steps` steps on TALKS, saved as the last checkpoint of stage `name`."""
    here = parallel.start(case.layout, seed=1)
    written, embedding = literals(case)
    chat = ChatTokenizer(TOKENIZER, DEFAULT_TEMPLATE)
    embedding = dataclasses.replace(
        embedding, vocab_size=VOCABULARY, padded_vocab_size=PADDED, sequence_length=SEQUENCE
    )
    used, _ = here.adapt(written)
    built = model.build(used, embedding, here)
    talks = [chat.encode([Message(role, content) for role, content in talk]) for talk in TALKS]
    for group in built.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 5e-3, 0.0
    loss = 0.0
    for _ in range(steps):
        loss = loop.train_step(built, [batch(talks)]).loss
    print(f"{name}: loss {loss:.4f}")
    Checkpoints(
        FOLDER / "work" / name / "checkpoints",
        Identity("run", "inputs"),
        keep_last=1,
        log=print,
        files=ModelFiles(TOKENIZER, split=None, chat_template=template),
    ).save(built, steps)


def batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> loop.Batch:
    """Padded rows; targets are the tokens whose mask is 1."""
    whole = torch.zeros(len(rows), SEQUENCE + 1, dtype=torch.int64)
    mask = torch.zeros(len(rows), SEQUENCE + 1)
    for row, (tokens, counted) in enumerate(rows):
        whole[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = torch.tensor(counted, dtype=torch.float32)
    return {
        "tokens": whole[:, :-1].contiguous(),
        "labels": whole[:, 1:].contiguous(),
        "loss_mask": mask[:, 1:].contiguous(),
        "position_ids": torch.arange(SEQUENCE).repeat(len(rows), 1),
    }


def write_bundle() -> None:
    stages = tuple(
        Stage(
            name=name,
            kind=name,
            program=f"{name}.py",
            program_id=program_identity("pass\n"),
            launcher="torchrun",
            nodes=1,
            processes_per_node=1,
            needs=needs,
            inputs=(),
            outputs=("output/summary.json",),
            implied=False,
        )
        for name, needs in (("pretrain", ()), ("sft", ("pretrain",)), ("dpo", ("sft",)))
    )
    for stage in stages:
        (FOLDER / stage.program).write_text("pass\n")
        if stage.name != "dpo":
            write_json(FOLDER / "work" / stage.name / "output" / "summary.json", {"key_figure": "trained"})
    files = {stage.program: file_hash(b"pass\n") for stage in stages}
    manifest = Manifest(SCHEMA_VERSION, "saved", "run", ".", stages, files)
    (FOLDER / MANIFEST_FILE).write_text(write_manifest(manifest))


if __name__ == "__main__":
    train_tokenizer((content for talk in TALKS for _, content in talk), VOCABULARY).save(str(TOKENIZER))
    run_world(2, lambda: train(Case(tensor=2, tied=True), "sft", STEPS, DEFAULT_TEMPLATE))
    run_world(1, lambda: train(Case(), "pretrain", 2, ""))
    run_world(2, lambda: train(Case(pipeline=2, family="qwen", bf16=True), "qwen", 2, ""))
    run_world(2, lambda: train(Case(tensor=2, family="gpt"), "gpt", 2, ""))
    run_world(2, lambda: train(Case(data=2, expert=2, family="mixtral"), "mixtral", 2, ""))
    run_world(2, lambda: train(Case(data=2, expert=2, family="deepseek", options=DEEPSEEK), "deepseek", 2, ""))
    write_bundle()
