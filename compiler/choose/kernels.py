"""What changes memory or time beside the degrees, and how often a run is checked and saved."""

from dataclasses import dataclass

from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.plan import Kernels, Layout, Shape
from trainwright.compiler.resolve_layout import ResolvedLayout

KEEP_CHECKPOINTS = 3
SAVE_EVERY_S = 1800.0  # half an hour of work is lost at most when a run is killed
SHARE_OF_VALIDATION = 0.02  # of the training FLOPs
VALIDATIONS = 10  # a run
FEWEST_SEQUENCES, MOST_SEQUENCES = 8, 1024  # a source and validation


@dataclass(frozen=True)
class Cadence:
    """How often the pretraining run is validated, and on how much."""

    every_steps: int
    sequences: int  # a source
    count: int  # validations in the run
    share: float  # of the training FLOPs that they take


def fuses_activation(shape: Shape, cuda: bool) -> bool:
    """Whether Megatron-Core has a fused kernel for the activation (0.16, MLP.forward): of SiLU a gated one, of GELU one gated or
    with a bias, which computes its approximation with tanh."""
    silu = shape.activation == "silu" and shape.gated
    gelu = shape.activation == "gelu_tanh" and (shape.gated or shape.linear_bias)
    return cuda and (silu or gelu)


def gradient_bytes(open_layout: ResolvedLayout) -> int:
    """Bytes of a gradient where it is summed: fp32 unless bf16 is pinned."""
    return 4 if open_layout.gradient_dtype.pick("fp32") == "fp32" else 2


def choose_cadence(steps: int, global_batch: int, num_sources: int, stated: int = 0) -> Cadence:
    """At least VALIDATIONS validations (fewer in a run of fewer steps), or one every `stated` steps; together they take
    SHARE_OF_VALIDATION of the training.

    A forward pass is a third of a step's FLOPs (forward + 2 x backward), so n validations of v sequences a source take
    n x num_sources x v / 3 of steps x global_batch. v is a power of two from FEWEST_SEQUENCES to MOST_SEQUENCES.
    """
    every = stated or max(1, round_down(steps / VALIDATIONS))
    count = -(-steps // every)  # the last step is always validated
    affordable = max(1, int(3 * SHARE_OF_VALIDATION * steps * global_batch / (count * num_sources)))
    sequences = min(MOST_SEQUENCES, max(FEWEST_SEQUENCES, 1 << (affordable.bit_length() - 1)))
    return Cadence(every, sequences, count, count * num_sources * sequences / 3 / (steps * global_batch))


def choose_kernels(
    ledger: Ledger,
    *,
    cuda: bool,
    layer_spec: str,
    fp32_gradients: bool,
    fp8: str,
    fp8_recipe: str,
    precision: str,
    shape: Shape,
    layout: Layout,
    steps: int,
    step_s: float,
) -> Kernels:
    """The kernels of a layout. `step_s` (s) only sets how many steps lie between two checkpoints."""
    engine, bf16, overlap = layer_spec == "transformer_engine", precision == "bf16", cuda and layout.data > 1
    fused_activation = fuses_activation(shape, cuda)

    def note(name: str, value: bool, on: str, off: str = "") -> bool:
        return ledger.note(f"kernels.{name}", value, "derived", on if value or not off else off)

    every = max(1, min(round_down(SAVE_EVERY_S / step_s), round_down(max(1, steps / 5))))
    return Kernels(
        layer_spec=ledger.note(
            "kernels.layer_spec",
            layer_spec,
            "default",
            "Transformer Engine's fused layers on CUDA devices, Megatron-Core's local ones on a CPU",
            pin="layout.layer_spec",
        ),
        params_dtype=ledger.note(
            "kernels.params_dtype", "bfloat16" if bf16 else "float32", "derived", f"training.precision is {precision}"
        ),
        bf16=note("bf16", bf16, "training.precision is bf16: fp32 master weights beside", "training.precision is fp32"),
        grad_reduce_in_fp32=ledger.note(
            "kernels.grad_reduce_in_fp32",
            fp32_gradients,
            "derived",
            "sums over many micro-batches and ranks lose bits in bf16",
            pin="layout.gradient_dtype",
        ),
        overlap_grad_reduce=note("overlap_grad_reduce", overlap, _overlap(cuda, layout.data)),
        overlap_param_gather=note(
            "overlap_param_gather", overlap and layout.distributed_optimizer, _overlap(cuda, layout.data)
        ),
        bias_activation_fusion=note(
            "bias_activation_fusion",
            fused_activation,
            f"Megatron-Core has a CUDA kernel for {shape.activation} of this kind",
            "no kernel: it needs CUDA, and gated SiLU, or GELU by its approximation with tanh, gated or with a bias",
        ),
        bias_dropout_fusion=note(
            "bias_dropout_fusion", cuda, "a CUDA kernel for bias, dropout and residual", "no kernel: it needs CUDA"
        ),
        masked_softmax_fusion=note(
            "masked_softmax_fusion", False, "flash or scaled-dot-product attention has no softmax of its own to fuse"
        ),
        gradient_accumulation_fusion=note(
            "gradient_accumulation_fusion", False, "its kernel is APEX's, which a plan cannot take for granted"
        ),
        apply_rope_fusion=note(
            "apply_rope_fusion",
            engine and shape.positions == "rope" and not shape.kv_lora_rank,
            "Transformer Engine has a kernel for rotary positions",
            f"it needs Transformer Engine and rotary positions, and not latent attention, with which Megatron-Core 0.16 calls it"
            f" experimental; here {layer_spec}, {shape.positions}",
        ),
        fp8=ledger.note("kernels.fp8", fp8, "default", "not asked for", pin="layout.fp8"),
        fp8_recipe=ledger.note(
            "kernels.fp8_recipe",
            fp8_recipe if fp8 != "none" else "none",
            "default",
            "scales from the steps before" if fp8 != "none" else "no 8-bit floats",
            pin="layout.fp8_recipe",
        ),
        moe_dispatcher=ledger.note(
            "kernels.moe_dispatcher",
            "alltoall" if shape.num_experts else "none",
            "derived",
            "each token goes to the devices of its experts alone" if shape.num_experts else "a dense model",
        ),
        moe_grouped_gemm=note(
            "moe_grouped_gemm",
            engine and shape.num_experts > 0,
            "Transformer Engine has a kernel for the products of several experts",
            f"no kernel: it needs Transformer Engine and experts; here {layer_spec}",
        ),
        batch_p2p_comm=note(
            "batch_p2p_comm",
            layout.virtual_pipeline == 1,
            "one batch of sends and receives between two stages",
            "between two interleaved stages a batch would swap the messages of its two directions",
        ),
        overlap_p2p_comm=note(
            "overlap_p2p_comm",
            cuda and layout.virtual_pipeline > 1,
            "messages of one chunk hide behind the computation of another",
            "Megatron-Core overlaps them in interleaved pipelines on CUDA alone",
        ),
        deallocate_pipeline_outputs=note(
            "deallocate_pipeline_outputs",
            cuda and layout.pipeline > 1,
            "a stage's output is only needed by the next stage",
            "nothing is sent, or (on a CPU) sending needs the output to stay",
        ),
        checkpoint_every_steps=ledger.note(
            "kernels.checkpoint_every_steps",
            every,
            "derived",
            f"at most {SAVE_EVERY_S / 60:.0f} minutes of {step_s:.3g} s steps, and at least 5 a run; 1, 2 or 5 x 10^n",
        ),
        checkpoint_keep_last=ledger.note(
            "kernels.checkpoint_keep_last", KEEP_CHECKPOINTS, "default", "the newest, and two to fall back on"
        ),
    )


def _overlap(cuda: bool, data: int) -> str:
    if not cuda:
        return "gloo on a CPU shares its cores with the computation: nothing to hide behind"
    return (
        f"data {data}: communication hides behind the backward and forward pass"
        if data > 1
        else "data 1: nothing to reduce"
    )


def round_down(value: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... up to `value` (1 below 1): a cadence people recognise, and a small change of an
    estimate does not move it."""
    power = 1
    while power * 10 <= value:
        power *= 10
    return next((factor * power for factor in (5, 2) if factor * power <= value), power)
