"""Two steps of a program's job on one rank, and what they take.

The first step makes what lasts (moments, buffers); the second is measured. A step of many micro-batches repeats itself: of a
pipeline, warm-up, two periods of the steady state and cool-down are run, and a period's counts are added for every one left out.
"""

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainwright.runtime.megatron import loop
from trainwright.runtime.megatron import model as building
from trainwright.runtime.megatron.dropout import Draws
from trainwright.runtime.megatron.job import Job, MicroBatch
from trainwright.runtime.megatron.model import Model, build_frozen
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.megatron.parallel import check_model, start
from trainwright.runtime.shadow import fakes
from trainwright.runtime.shadow.formulas import scores_formula
from trainwright.runtime.shadow.recorder import Counts, Recorder
from trainwright.runtime.shadow.standins import is_stand_in, select_routed
from trainwright.runtime.stages.training import open_model

BUILD, FORWARD, BACKWARD, OPTIMIZER, BETWEEN = "build", "forward pass", "backward pass", "optimizer", "between passes"


class NotShadowed(Exception):
    """A dry run cannot stand for what the program asks for; says what that is."""


@dataclass(frozen=True)
class Shadowed:
    """A job whose two steps have run."""

    job: Job
    model: Model
    recorder: Recorder
    counts: Counts  # of a whole step
    ran: int  # micro-batches of the measured step
    activation_bytes: int
    reference_peak_bytes: int
    static: dict[str, int]  # bytes by kind, between steps
    seconds: float


def shadow_job(job: Job, *, cuda: bool, all_micro_batches: bool, keep_history: bool = False) -> Shadowed:
    """Run the job's steps on this process's rank. `keep_history`: of the measured step, for a trace.

    Raises NotShadowed for what a dry run does not stand for.
    """
    _check(job)
    began = time.monotonic()
    recorder = ModelRecorder(job, cuda=cuda)
    recorder.history = [] if keep_history else None
    fakes.record_into(recorder)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, _phases(recorder), recorder.modules.watched():
        recorder.enter_phase(BUILD)
        model = _open(job)
        for number, chunk in enumerate(model.chunks):
            recorder.modules.name(chunk, f"chunk{number}" if len(model.chunks) > 1 else "", is_stand_in)
        steps = _Steps(job, model, recorder, all_micro_batches)
        reference = steps.ask() if job.asks_reference or job.loss is None else 0
        if job.loss is None:
            counts, ran, static, kept = recorder.counts, job.micro_batches, _static_bytes(model, recorder), 0
        else:
            steps.train(1)
            gc.collect()
            static = _static_bytes(model, recorder)
            recorder.forget_peak()
            counts, ran, kept = steps.train(2)
    fakes.record_into(None)
    return Shadowed(
        job=job,
        model=model,
        recorder=recorder,
        counts=counts,
        ran=ran,
        activation_bytes=kept,
        reference_peak_bytes=reference if job.loss else 0,
        static=static,
        seconds=time.monotonic() - began,
    )


def _check(job: Job) -> None:
    literals = job.literals
    if literals.model.fp8:
        raise NotShadowed(f"fp8={literals.model.fp8!r}: what 8-bit products keep is not modelled")
    if literals.ddp is not None and literals.ddp.use_megatron_fsdp:
        raise NotShadowed("use_megatron_fsdp=True: what it shards and gathers is not modelled")
    if literals.model.num_moe_experts and literals.model.moe_token_dispatcher_type != "alltoall":
        raise NotShadowed(
            f"moe_token_dispatcher_type={literals.model.moe_token_dispatcher_type!r}: balanced routing is known of "
            "'alltoall' alone"
        )


def _open(job: Job) -> Model:
    if job.loss is not None:
        return open_model(job).model
    check_model(
        job.parallel,
        job.literals.model,
        sequence_length=job.embedding.sequence_length,
        padded_vocab_size=job.embedding.padded_vocab_size,
    )
    platform = start(job.parallel, job.seed)
    return build_frozen(platform.adapt(job.literals)[0], job.embedding, platform)


class ModelRecorder(Recorder):  # type: ignore[no-untyped-call]
    """A recorder that knows how many experts a token goes to."""

    def __init__(self, job: Job, *, cuda: bool) -> None:
        super().__init__(cuda=cuda)
        # Of every forward pass of a step: its chunk, and what was counted before.
        self.passes: list[tuple[int, Counts]] = []
        self.begins: list[int] = []  # of every forward pass of a step: place in the log
        self.after_first_forward = 0  # bytes
        model = job.literals.model
        widths = {model.kv_channels}
        if model.multi_latent_attention:
            widths = {model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim}
        for operation in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.formulas[operation] = scores_formula(widths)
        self._experts_per_token = job.literals.model.moe_router_topk if job.literals.model.num_moe_experts else 0

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As Recorder's."""
        if func is torch.ops.aten.masked_select.default and self._experts_per_token:
            self.stand_ins.add("balanced routing")
            return select_routed(args[1], args[0], self._experts_per_token)
        return super().compute(func, args, kwargs)


class _Steps:
    def __init__(self, job: Job, model: Model, recorder: ModelRecorder, all_micro_batches: bool) -> None:
        self._job, self._model, self._recorder, self._all = job, model, recorder, all_micro_batches

    def train(self, step: int) -> tuple[Counts, int, int]:
        """(what a whole step counts, micro-batches that ran, bytes that the first forward pass left)."""
        recorder, job = self._recorder, self._job
        assert job.loss is not None
        group, count = self._cut()
        recorder.passes, recorder.begins = [], []
        before = recorder.live
        loop.train_step(self._model, Batches(job.micro_batch, count), job.loss, Draws(job.seed, step))
        left_out = (job.micro_batches - count) // group
        kept = recorder.after_first_forward - before
        if not left_out:
            return recorder.counts, count, kept
        # The last forward pass, and that of a period before it, begin in the steady state: see `_cut`.
        counted = [counts for _, counts in recorder.passes]
        period = group * len(self._model.chunks)
        # What a micro-batch leaves until the step ends (its losses), those that are left out leave too, before the last period.
        lasting = self._lasting_bytes(micro_batch=1)
        recorder.raise_peak(after=recorder.begins[-1 - period], by=left_out * group * lasting)
        return recorder.counts.plus(left_out, counted[-1], counted[-1 - period]), count, kept

    def _lasting_bytes(self, micro_batch: int) -> int:
        """Of what the forward passes of a micro-batch made, as much as is still alive after the step's last backward pass."""
        recorder = self._recorder
        end = max(place for place, name in recorder.phases if name == BACKWARD)
        end = min(place for place, name in recorder.phases if place >= end and name == BETWEEN)
        begin = recorder.begins[0]
        passes = {_named(FORWARD, micro_batch, chunk) for chunk in range(len(self._model.chunks))}
        return sum(
            block.bytes
            for block in recorder.blocks
            if block.born >= begin and block.phase in passes and not 0 <= block.died < end
        )

    def _warm_up(self) -> int:
        stages, stage = self._job.parallel.pipeline, int(parallel_state.get_pipeline_model_parallel_rank())
        return stages - 1 - stage

    def _cut(self) -> tuple[int, int]:
        """(micro-batches of a period, how many are run)."""
        stages, total = self._job.parallel.pipeline, self._job.micro_batches
        group = stages if len(self._model.chunks) > 1 else 1
        least = self._warm_up() + 3 if group == 1 else 3 * group
        if self._all or total <= least:
            return group, total
        return group, least + (total - least) % group

    def ask(self) -> int:
        """Bytes at the peak while the model is asked what it says of a row."""
        micro = self._job.micro_batch
        length = micro.length // micro.segments
        one = Tokens((0,) * (length + 1), (0,) + (1,) * length)
        rows = self._job.parallel.data * (
            self._job.micro_batches if self._job.loss is None else 1
        )  # data ranks share them
        self._recorder.forget_peak()
        loop.score_sequences(self._model, [one] * (micro.segments * rows), row_tokens=micro.length, greedy=False)
        return self._recorder.peak


class Batches(Sequence[dict[str, Tensor]]):
    """Micro-batches of one shape, each made when it is asked for: on a device they are copied there one by one."""

    def __init__(self, micro: MicroBatch, count: int) -> None:
        self._micro, self._count = micro, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        micro = self._micro
        shape = (micro.rows, micro.length)
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "labels", "position_ids")}
        batch["loss_mask"] = torch.ones(shape, dtype=torch.float32)
        if micro.segments:
            lengths = [micro.length // micro.segments] * micro.segments
            batch["segments"] = torch.tensor(lengths, dtype=torch.int32)
            batch["reference"] = torch.zeros(1, micro.segments)
        return batch


@contextlib.contextmanager
def _phases(recorder: ModelRecorder) -> Iterator[None]:
    """Tell the recorder which pass of which micro-batch is under way; schedules call these two for each."""
    forward, backward, build = schedules.forward_step, schedules.backward_step, vars(building)["build_optimizer"]

    def forward_step(*args: Any, **kwargs: Any) -> Any:
        chunk = kwargs.get("vp_stage") or 0
        number = sum(1 for other, _ in recorder.passes if other == chunk)
        recorder.passes.append((chunk, recorder.counts.copy()))
        recorder.begins.append(len(recorder.log))
        recorder.enter_phase(_named(FORWARD, number, chunk))
        out = forward(*args, **kwargs)
        if len(recorder.passes) == 1:
            recorder.after_first_forward = recorder.live
        recorder.enter_phase(BETWEEN)
        return out

    def backward_step(*args: Any, **kwargs: Any) -> Any:
        recorder.enter_phase(BACKWARD)
        out = backward(*args, **kwargs)
        recorder.enter_phase(BETWEEN)
        return out

    def build_optimizer(*args: Any, **kwargs: Any) -> Any:
        recorder.enter_phase(OPTIMIZER)
        optimizer = build(*args, **kwargs)
        step = optimizer.step

        def update(*args: Any, **kwargs: Any) -> Any:
            recorder.enter_phase(OPTIMIZER)
            done = step(*args, **kwargs)
            recorder.enter_phase(BETWEEN)
            return done

        optimizer.step = update
        recorder.enter_phase(BUILD)
        return optimizer

    schedules.forward_step, schedules.backward_step = forward_step, backward_step
    vars(building)["build_optimizer"] = build_optimizer
    try:
        yield
    finally:
        schedules.forward_step, schedules.backward_step = forward, backward
        vars(building)["build_optimizer"] = build


def _named(what: str, number: int, chunk: int) -> str:
    return f"{what} of micro-batch {number}" + (f", chunk {chunk}" if chunk else "")


def _static_bytes(model: Model, recorder: Recorder) -> dict[str, int]:
    """Say of every block that is alive between steps of which kind it is; bytes by kind."""
    parameters = [parameter for chunk in model.ddp for parameter in chunk.parameters()]
    gradients = [parameter.main_grad for parameter in parameters if hasattr(parameter, "main_grad")]
    for kind, tensors in (("gradients", gradients), ("parameters", parameters)):
        for tensor in tensors:
            number = recorder.number_of(tensor)
            if number is not None:
                recorder.blocks[number].kind = kind
    found: Counter[str] = Counter()
    for block in recorder.blocks:
        if block.died < 0:
            block.kind = block.kind or (OPTIMIZER if block.phase == OPTIMIZER else "buffers")
            found[block.kind] += block.tensor_bytes
    return dict(found)
