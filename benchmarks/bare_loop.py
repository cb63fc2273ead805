"""The least program that trains the model of an emitted one on the same Megatron-Core: what `overhead.py` compares with.

    torchrun --standalone --nproc-per-node N benchmarks/bare_loop.py BUNDLE STEPS OUTPUT

Written by hand on Megatron-Core and the runtime's CPU platform, norm and attention, which a CPU needs: the model of BUNDLE's
plan, random tokens that are in memory before the first step, no metrics, no checks, no checkpoint. Rank 0 writes to OUTPUT
when each step ended (s).
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from trainwright.runtime.megatron.layers import CausalAttention, Norm
from trainwright.runtime.megatron.platform import install


def main(bundle: Path, steps: int, output: Path) -> None:
    install()
    plan = json.loads((bundle / "plan.json").read_text())
    shape, training, layout = plan["shape"], plan["training"], plan["layout"]
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["ffn_hidden_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_query_groups"],
        kv_channels=shape["head_dim"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    model = DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        module=GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules([layer] * config.num_layers, Norm),
            vocab_size=layout["padded_vocab_size"],
            max_sequence_length=training["context_length"],
            share_embeddings_and_output_weights=shape["tied_embeddings"],
            position_embedding_type="rope",
            rotary_base=shape["rotary_base"],
        ),
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True),
        [model],
    )
    config.finalize_model_grads_func = finalize_model_grads
    count = training["global_batch"] // (layout["micro_batch"] * dist.get_world_size())
    generator = torch.Generator().manual_seed(dist.get_rank())
    size = (count, layout["micro_batch"], training["context_length"] + 1)
    tokens = torch.randint(0, shape["vocab_size"], size, generator=generator)
    positions = torch.arange(training["context_length"]).repeat(layout["micro_batch"], 1)

    def forward(batches, module):
        batch = next(batches)
        nats = module(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())

        def loss(nats):
            return nats.mean(), {}

        return nats, loss

    schedule, ends = get_forward_backward_func(), []
    for _ in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        schedule(
            forward_step_func=forward,
            data_iterator=iter(tokens),
            model=[model],
            num_microbatches=count,
            seq_length=training["context_length"],
            micro_batch_size=layout["micro_batch"],
            forward_only=False,
        )
        optimizer.step()
        ends.append(time.time())
    if dist.get_rank() == 0:
        output.write_text(json.dumps(ends))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
