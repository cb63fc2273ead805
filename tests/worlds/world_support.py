"""Worlds of processes on one machine, and the comparison of what they trained with what one process trains.

A world is forked from the test's process, which has imported torch and Megatron-Core already: starting one costs about a
second, where torchrun would import everything in every process.
"""

import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from tiny_families import GEMMA, MIXTURES
from torch import Tensor

from trainwright.runtime.megatron import dropout, loop, losses, model, parallel, pieces, platform
from trainwright.runtime.megatron.experts import AUXILIARY_FIGURES
from trainwright.runtime.megatron.parameters import PLAIN, Groups

VOCABULARY, SEQUENCE, GLOBAL_BATCH, MICRO_BATCH, STEPS = 256, 32, 8, 2, 10
HEAD_DIM = 16
DEGREES = ("tensor", "pipeline", "virtual_pipeline", "context", "data", "expert", "expert_tensor")
LEARNING_RATE = 3e-3
TOLERANCE = 1e-4  # losses, gradient norms (relative), final parameters (norm of difference / norm)
GRADIENT_TOLERANCE = 1e-5  # of step 1, by name (norm of difference / norm)

T = TypeVar("T")


class WorldFailed(AssertionError):
    """A rank raised, died or hung; the message holds the first rank's traceback."""


def run_world(size: int, work: Callable[[], T], timeout_s: float = 120) -> list[T]:
    """Fork `size` ranks joined over gloo, run `work` in each, return what each returned (pickled), by rank."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork of a process that has threads
            ranks = {_fork_rank(rank, size, Path(folder), work): rank for rank in range(size)}
        alive, reason = set(ranks), ""
        while alive:
            for pid in list(alive):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    alive.discard(pid)
                    if status and not reason:
                        reason = f"rank {ranks[pid]} ended with status {status}"
                        _wait_for_others(alive, 2.0)
                        break
            if time.monotonic() - started > timeout_s:
                reason = reason or f"no end after {timeout_s} s"
            if reason:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                alive = set()
            time.sleep(0.02)
        if reason:
            errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
            raise WorldFailed("\n".join([reason, *errors]))
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(size)]


def _wait_for_others(pids: set[int], seconds: float) -> None:
    """A rank that fails takes the others along by itself, mostly: give them time to write down why."""
    end = time.monotonic() + seconds
    while pids and time.monotonic() < end:
        for pid in list(pids):
            if os.waitpid(pid, os.WNOHANG)[0]:
                pids.discard(pid)
        time.sleep(0.02)


def _fork_rank(rank: int, size: int, folder: Path, work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        output = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        platform.install()
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(work()))
        dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(code)


# ---- what is trained ----


@dataclass(frozen=True)
class Task:
    """What is trained on, and by which loss."""

    name: str
    batches: Callable[[int, int, int], list[dict[str, Tensor]]]  # of a step, a data rank, of so many
    loss: losses.Loss = losses.token_loss
    per_token: bool = True  # calculate_per_token_loss: tokens weigh alike, not micro-batches


def text(step: int, data_rank: int, data_size: int) -> list[dict[str, Tensor]]:
    """Micro-batches as in pretraining: small steps around the whole vocabulary, so every shard is hit."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, 1), generator=generator)
    strides = torch.randint(1, 5, (GLOBAL_BATCH, SEQUENCE), generator=generator) * 7
    rows = torch.cat([start, strides], 1).cumsum(1) % VOCABULARY
    share = GLOBAL_BATCH // data_size
    mine = rows[data_rank * share : (data_rank + 1) * share]
    return [
        {
            "tokens": piece[:, :-1].contiguous(),
            "labels": piece[:, 1:].contiguous(),
            "loss_mask": torch.ones(MICRO_BATCH, SEQUENCE),
            "position_ids": torch.arange(SEQUENCE).repeat(MICRO_BATCH, 1),
        }
        for piece in mine.split(MICRO_BATCH)
    ]


TEXT = Task("text", text, per_token=False)


@dataclass(frozen=True)
class Case:
    """One training run of a small model."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    family: str = "llama"  # a key of FAMILIES
    layers: int = 4
    options: tuple[tuple[str, Any], ...] = ()  # further fields of the model's config
    tied: bool = False
    distributed_optimizer: bool = True
    overlap: bool = False
    sequence_parallel: bool = True  # where tensor > 1
    bf16: bool = False
    bf16_gradients: bool = False  # summed in bf16
    steps: int = STEPS
    recompute: bool = False
    dropout: float = 0.0
    optimizer: str = "adam"
    groups: Groups = PLAIN
    task: Task = TEXT

    @property
    def layout(self) -> parallel.Parallel:
        return parallel.Parallel(**{name: getattr(self, name) for name in DEGREES})

    def __str__(self) -> str:
        words = [f"{name} {n}" for name in DEGREES if (n := getattr(self, name)) > 1]
        flags = [
            name
            for name in ("tied", "distributed_optimizer", "overlap", "bf16", "bf16_gradients", "recompute")
            if getattr(self, name)
        ]
        if self.optimizer != "adam":
            flags.append(self.optimizer)
        options = [f"{name} {value}" for name, value in self.options]
        return " x ".join(words or ["one process"]) + f" ({', '.join([self.task.name, self.family, *flags, *options])})"


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "num_query_groups": 2,
    },
    "gpt": {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "add_bias_linear": True,
        "num_query_groups": 4,
    },
    "qwen": {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "num_query_groups": 2,
        "qk_layernorm": True,
    },
    "bloom": {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "add_bias_linear": True,
        "num_query_groups": 4,
    },
    "gemma": GEMMA,
    **MIXTURES,
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUT_OPTIONS = (  # fields of the model's config that say how it is run, and not what it is
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "batch_p2p_comm",
    "overlap_p2p_comm",
    "deallocate_pipeline_outputs",
    "moe_token_dispatcher_type",
)
POSITIONS = {"gpt": "learned", "bloom": "alibi"}  # of the other families: rope


def literals(case: Case) -> tuple[platform.Literals, model.Embedding]:
    """The configs that a program for this case would hold."""
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    warnings.filterwarnings("ignore", message="full scope is deprecated")  # Megatron-Core, of its own default
    family = FAMILIES[case.family]
    config = (MLATransformerConfig if "kv_lora_rank" in family else TransformerConfig)(
        num_layers=case.layers,
        layernorm_epsilon=1e-5,
        hidden_dropout=case.dropout,
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        virtual_pipeline_model_parallel_size=case.virtual_pipeline if case.virtual_pipeline > 1 else None,
        context_parallel_size=case.context,
        expert_model_parallel_size=case.expert,
        expert_tensor_parallel_size=case.expert_tensor,
        sequence_parallel=case.sequence_parallel and case.tensor > 1,
        bf16=case.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=case.task.per_token,
        **{
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "kv_channels": HEAD_DIM,
            "init_method_std": 0.08,
            "batch_p2p_comm": case.virtual_pipeline == 1,
            "attention_dropout": case.dropout,
            **family,
            **(RECOMPUTE if case.recompute else {}),
            **dict(case.options),
        },
    )
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap and case.distributed_optimizer,
        grad_reduce_in_fp32=not case.bf16_gradients,
    )
    optimizer = OptimizerConfig(
        optimizer=case.optimizer,
        lr=LEARNING_RATE if case.optimizer == "adam" else LEARNING_RATE / 10,
        min_lr=0.0,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        # Where a gradient is all but zero, Adam turns rounding into steps; some token between two experts then goes to the other.
        adam_eps=1e-6 if case.family in ("gemma", *MIXTURES) else 1e-8,
        clip_grad=1.0,
        bf16=case.bf16,
        params_dtype=dtype,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_param_gather=case.overlap and case.distributed_optimizer,
    )
    positions = POSITIONS.get(case.family, "rope")
    embedding = model.Embedding(
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        sequence_length=SEQUENCE,
        positions=positions,
        rotary_base=10_000 if positions == "rope" else 0,
        tied=case.tied,
        output_multiplier=1 / case.groups.width,
    )
    return platform.Literals(config, ddp, optimizer, "local"), embedding


@dataclass
class Record:
    """What one rank of a run saw. Tensors are this rank's own, by the name that they have in one process."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of step 1; empty with the distributed optimizer
    final: dict[str, Tensor] = field(default_factory=dict)
    cuts: dict[str, pieces.Cut] = field(default_factory=dict)  # which part of one process's tensors they are
    figures: list[Mapping[str, float]] = field(default_factory=list)


def build(case: Case, initial: dict[str, Tensor] | None = None) -> model.Model:
    """This rank's model of `case`, with `initial` (one process's weights) where given."""
    here = parallel.start(case.layout, seed=1)
    written, embedding = literals(case)
    used, _ = here.adapt(written)
    built = model.build(used, embedding, here, case.groups)
    if initial is not None:
        copy_weights(built, initial)
        built.optimizer.reload_model_params()
    return built


def build_frozen(case: Case, initial: dict[str, Tensor] | None = None) -> model.Model:
    """As `build`, without an optimizer."""
    here = parallel.start(case.layout, seed=1)
    written, embedding = literals(case)
    used, _ = here.adapt(replace(written, ddp=None, optimizer=None))
    built = model.build_frozen(used, embedding, here)
    if initial is not None:
        copy_weights(built, initial)
    return built


def copy_weights(built: model.Model, whole: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for piece in pieces.parameters(built):
            piece.tensor.copy_(piece.cut.of(whole[piece.name]))


def train(built: model.Model, steps: Sequence[int], task: Task = TEXT) -> Record:
    """Train the given steps at the full learning rate."""
    record = Record(initial=snapshot(built), cuts={piece.name: piece.cut for piece in pieces.parameters(built)})
    take_step = built.optimizer.step

    def keep_gradients() -> Any:
        if not record.gradients and not built.ddp[0].ddp_config.use_distributed_optimizer:
            record.gradients = {name: parameter.main_grad.clone() for name, parameter in named(built)}
        return take_step()

    built.optimizer.step = keep_gradients
    for group in built.optimizer.param_groups:
        group["lr"], group["weight_decay"] = group["max_lr"], 0.1 * group["wd_mult"]
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for step in steps:
        result = loop.train_step(built, task.batches(step, rank, size), task.loss, dropout.Draws(seed=1, step=step))
        record.losses.append(result.loss)
        record.grad_norms.append(result.grad_norm)
        record.figures.append(result.figures)
    built.optimizer.step = take_step
    if built.overlaps_param_gather:
        for chunk in built.ddp:
            chunk.start_param_sync(force_sync=True)
    record.final = snapshot(built)
    return record


def named(built: model.Model) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the name that they have in one process."""
    return ((piece.name, piece.tensor) for piece in pieces.parameters(built))


def snapshot(built: model.Model) -> dict[str, Tensor]:
    return {name: parameter.detach().float().clone() for name, parameter in named(built)}


# ---- comparison ----


@dataclass(frozen=True)
class Difference:
    """How far a run is from one process: largest relative differences over steps; worst tensors over all ranks, as
    norm of the difference / norm."""

    loss: float
    grad_norm: float
    gradient: float  # 0 where the buffer does not hold whole gradients
    gradient_name: str
    parameter: float
    parameter_name: str
    figure: float  # reported losses that the model adds by itself

    def violations(self) -> list[str]:
        """What the test of equality refuses, with the worst figure first; empty for an equal run."""
        found = [
            (self.loss / TOLERANCE, f"losses {self.loss:.1e}"),
            (self.grad_norm / TOLERANCE, f"gradient norms {self.grad_norm:.1e}"),
            (self.gradient / GRADIENT_TOLERANCE, f"step-1 gradients {self.gradient:.1e} ({self.gradient_name})"),
            (self.figure / TOLERANCE, f"figures {self.figure:.1e}"),
            (self.parameter / TOLERANCE, f"parameters {self.parameter:.1e} ({self.parameter_name})"),
        ]
        return [text for ratio, text in sorted(found, reverse=True) if ratio > 1]

    def __str__(self) -> str:
        return (
            f"losses {self.loss:.1e}, gradient norms {self.grad_norm:.1e}, step-1 gradients {self.gradient:.1e}, "
            f"parameters {self.parameter:.1e}"
        )


def compare(record: Record, reference: Record) -> Difference:
    """Compare this rank's record with one process's; every rank of the world calls it, and gets the world's worst."""

    def worst(mine: dict[str, Tensor], whole: dict[str, Tensor]) -> tuple[float, str]:
        distances = []
        for name, local in mine.items():
            expected = _determined(name, record.cuts[name].of(whole[name]))
            tensor = _determined(name, local)
            distance = float((tensor - expected).norm() / expected.norm().clamp(min=1e-12))
            distances.append((distance if distance == distance else float("inf"), name))
        return everywhere(max(distances, default=(0.0, "")))

    def relative(mine: list[float], whole: list[float]) -> float:
        distances = [abs(a - b) / abs(b) for a, b in zip(mine, whole, strict=True)]
        return everywhere(max(distance if distance == distance else float("inf") for distance in distances))

    def everywhere(mine: Any) -> Any:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return max(everyone)

    def figures(of: Record) -> list[list[float]]:
        return [[step[name] for step in of.figures] for name in AUXILIARY_FIGURES if name in (of.figures or [{}])[0]]

    gradient, gradient_name = worst(record.gradients, reference.gradients)
    parameter, parameter_name = worst(record.final, reference.final)
    return Difference(
        relative(record.losses, reference.losses),
        relative(record.grad_norms, reference.grad_norms),
        gradient,
        gradient_name,
        parameter,
        parameter_name,
        max((relative(*both) for both in zip(figures(record), figures(reference), strict=True)), default=0.0),
    )


def _determined(name: str, tensor: Tensor) -> Tensor:
    """Leave out the key part of a bias of queries, keys and values (here one query head a group). Without RoPE it adds the
    same number to every score of a query, which softmax ignores: its gradient is rounding noise, which Adam scales up."""
    if not name.endswith("linear_qkv.bias"):
        return tensor
    return tensor.view(-1, 3, HEAD_DIM)[:, (0, 2)]


def run_reference(case: Case) -> Record:
    """One process's run of the same model, with the ordinary optimizer so that step-1 gradients are whole."""
    one = replace(case, **dict.fromkeys(DEGREES, 1), distributed_optimizer=False, overlap=False, recompute=False)
    one = replace(one, bf16_gradients=False)
    one = replace(one, options=tuple(option for option in case.options if option[0] not in LAYOUT_OPTIONS))
    return run_world(1, lambda: train(build(one), range(one.steps), one.task))[0]


def run_cases(cases: Sequence[Case], references: dict[Case, Record]) -> list[Difference]:
    """Train each case in one world (all must need the same number of processes), compared with its reference."""

    def work() -> list[Difference]:
        found = []
        for case in cases:
            reference = references[case]
            record = train(build(case, reference.initial), range(case.steps), case.task)
            found.append(compare(record, reference))
            parallel.stop()
        return found

    sizes = {case.layout.world_size for case in cases}
    assert len(sizes) == 1, "one world has one size"
    return run_world(sizes.pop(), work)[0]
