"""The shadow's instrument is right: what it finds of each rank is what real processes count of themselves, byte by byte.

The real ones join over gloo, open the same job and train two steps on real tensors. About 60 s.
"""

import contextlib
import gc
import json
import runpy
import subprocess
import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.pipeline_parallel import schedules
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from world_support import run_world

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle
from trainwright.compiler.load import load_spec
from trainwright.compiler.resolve import resolve_spec
from trainwright.runtime.megatron import layers, loop
from trainwright.runtime.megatron.dropout import Draws
from trainwright.runtime.megatron.job import Job, take_over
from trainwright.runtime.shadow.driver import Batches
from trainwright.runtime.shadow.standins import mask_of_last
from trainwright.runtime.stages.training import open_model

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore:full scope is deprecated")]

SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}
EXPERTS = {"experts_per_token": 2, "expert_ffn_hidden_size": 64}
# Messages' first argument is what a rank gives, of these the second.
GIVES_SECOND = (
    *("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_"),
    *("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_"),
)


SETTLE_S = 0.2  # gloo's threads let go of what they sent a moment after it has arrived


@dataclass(frozen=True)
class World:
    """`layout` and the number of processes; of a mixture what depends on which expert a token goes to is not compared."""

    processes: int
    layout: dict[str, Any]
    stage: str = "pretrain"
    experts: int = 0
    precision: str = "fp32"


WORLDS = {
    "one process": World(1, {"micro_batch": 2}),
    "one process, bf16, recompute": World(
        1, {"recompute": "full", "recompute_method": "block", "recompute_layers": 1}, precision="bf16"
    ),
    "sft on one": World(1, {}, stage="sft"),
    "tensor": World(2, {"tensor": 2}),
    "pipeline, dpo": World(2, {"pipeline": 2}, stage="dpo"),
    "context": World(2, {"context": 2}),
    "interleaved": World(4, {"pipeline": 2, "virtual_pipeline": 2}),
    "mixture": World(4, {"tensor": 2, "expert": 2}, experts=4),
}


def write_bundle(folder: Path, world: World) -> dict[str, Any]:
    """The manifest's entry of the stage; its program lies in `folder`."""
    family = "mixtral" if world.experts else "llama"
    spec = {
        "name": "worlds",
        "model": {
            "family": family,
            "shape": SHAPE | (EXPERTS if world.experts else {}),
            "context_length": 64,
            "vocab_size": 512,
            "precision": world.precision,
            **({"num_experts": world.experts} if world.experts else {}),
        },
        "data": {"sources": [{"name": "docs", "path": "corpus/*.jsonl"}], "tokens": "1M"},
        "training": {"global_batch": "8 sequences", "learning_rate": 1e-3},
        "compute": {"device": "cpu", "nodes": 1, "devices_per_node": world.processes},
        "layout": {"micro_batch": 1, **world.layout},
        "stages": {"pretrain": {}, **({world.stage: {"data": "x.jsonl"}} if world.stage != "pretrain" else {})},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    for name, content in emit_bundle(choose_plan(resolve_spec(load_spec(folder / "spec.yaml", ())))).files.items():
        (folder / name).write_bytes(content)
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    return next(stage for stage in stages if stage["name"] == world.stage)


class Count(TorchDispatchMode):
    """Bytes of the storages that operations make and that are alive; messages. What is made of Python's numbers (lengths of
    sequences), and of nothing else, is not counted, nor by the shadow."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.messages: Counter[tuple[str, int]] = Counter()
        self.message_bytes: Counter[tuple[str, int]] = Counter()
        self._known: weakref.WeakKeyDictionary[Any, bool] = (
            weakref.WeakKeyDictionary()
        )  # storage: whether it is counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._message(func, args)
            return out
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        of_numbers = bool(read) and not any(self._known.get(tensor.untyped_storage(), False) for tensor in read)
        for made in tree_leaves(out):
            if not isinstance(made, Tensor) or made.untyped_storage() in self._known:
                continue
            storage = made.untyped_storage()
            self._known[storage] = not of_numbers
            if not of_numbers:
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.live -= size

    def _message(self, func: Any, args: Any) -> None:
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        name, ranks = func._schema.name.split("::")[1], torch.distributed.ProcessGroup.unbox(group).size()
        if ranks == 1 or "barrier" in name:
            return
        given = args[1] if name in GIVES_SECOND else args[0]
        self.messages[name, ranks] += 1
        self.message_bytes[name, ranks] += sum(
            leaf.numel() * leaf.element_size() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)
        )


class _Done(BaseException):
    pass


def measured(program: Path) -> dict[str, Any]:
    """What this process counts of itself while it trains two steps of a program's job."""
    found: dict[str, Any] = {}

    def taker(job: Job) -> None:
        found.update(_train(job))
        raise _Done

    take_over(taker)
    # Torch's own is a tensor that no dispatch mode takes; on a CPU it becomes this table (torch/nn/attention/bias.py).
    vars(layers)["causal_lower_right"] = mask_of_last(cuda=False)
    with contextlib.suppress(_Done):
        runpy.run_path(str(program), run_name="__main__")
    return found


def _train(job: Job) -> dict[str, Any]:
    assert job.loss is not None
    after_first: list[int] = []
    forward = schedules.forward_step

    def forward_step(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if not after_first:
            time.sleep(SETTLE_S)
        after_first.append(count.live)
        return out

    with Count() as count:
        model = open_model(job).model
        loop.train_step(model, Batches(job.micro_batch, job.micro_batches), job.loss, Draws(job.seed, 1))
        gc.collect()
        static = _static_bytes(model)
        schedules.forward_step = forward_step
        count.messages.clear()
        count.message_bytes.clear()
        time.sleep(SETTLE_S)
        before = count.live
        loop.train_step(model, Batches(job.micro_batch, job.micro_batches), job.loss, Draws(job.seed, 2))
    return {
        "parameters": sum(parameter.numel() for chunk in model.chunks for parameter in chunk.parameters()),
        "static": static,
        "activations": after_first[0] - before,
        "messages": dict(count.messages),
        "message_bytes": dict(count.message_bytes),
    }


def _static_bytes(model: Any) -> dict[str, int]:
    parameters = [parameter for chunk in model.ddp for parameter in chunk.parameters()]
    of_model = _storages(parameters)
    optimizers = getattr(model.optimizer, "chained_optimizers", [model.optimizer])
    of_optimizer: dict[int, int] = {}
    for one in optimizers:
        for group in one.optimizer.param_groups:
            of_optimizer |= _storages(group["params"])
        for state in one.optimizer.state.values():
            of_optimizer |= _storages([value for value in state.values() if isinstance(value, Tensor) and value.dim()])
    gradients = _storages([parameter.main_grad for parameter in parameters])
    mine = {place: size for place, size in of_optimizer.items() if place not in of_model}
    return {
        name: sum(part.values())
        for name, part in (("parameters", of_model), ("gradients", gradients), ("optimizer", mine))
    }


def _storages(tensors: Any) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def shadowed(program: Path, stage: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """What a shadow finds of every rank."""
    request = {"program": str(program), "stage": stage["name"], "kind": stage["kind"], "platform": "cpu"}
    request |= {"world_size": processes, "ranks": list(range(processes)), "all_micro_batches": True}
    command = [sys.executable, "-m", "trainwright.runtime.shadow.child"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=120, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert all("result" in answer for answer in answers), answers
    return [answer["result"] for answer in answers]


@pytest.mark.parametrize("name", WORLDS)
def test_the_shadow_finds_what_real_processes_count(tmp_path: Path, name: str) -> None:
    world = WORLDS[name]
    stage = write_bundle(tmp_path, world)
    program = tmp_path / stage["program"]
    real = run_world(world.processes, lambda: measured(program))
    for mine, theirs in zip(shadowed(program, stage, world.processes), real, strict=True):
        assert mine["parameters"] == theirs["parameters"]
        kinds = ("parameters", "gradients", "optimizer")
        assert {kind: mine["static_bytes"][kind] for kind in kinds} == theirs["static"]
        messages: Counter[tuple[str, int]] = Counter()
        message_bytes: Counter[tuple[str, int]] = Counter()
        for one in mine["collectives"]:
            messages[one["operation"], one["size"]] += one["count"]
            message_bytes[one["operation"], one["size"]] += one["bytes"]
        assert messages == theirs["messages"]
        if not world.experts:
            assert message_bytes == theirs["message_bytes"]
            assert mine["activation_bytes"] == theirs["activations"]
