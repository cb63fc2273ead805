"""Align tiny with preferences (DPO) on 2 x cpu (data 2).

Run:       torchrun --standalone --nproc-per-node 2 07_dpo.py
Leaves:    work/dpo/checkpoints/, and the accuracy on pairs before and after in output/summary.json
Why:       trainwright explain; every literal below is a leaf of plan.json (run 40e59a63)
"""

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from trainwright.runtime.stages import dpo


def main() -> None:
    dpo.run(
        stage="dpo",
        run_id="40e59a63",
        seed=1234,
        initial="sft",
        parallel=dpo.Parallel(
            tensor=1,
            pipeline=1,
            virtual_pipeline=1,
            context=1,
            expert=1,
            expert_tensor=1,
            data=2,
        ),
        model=TransformerConfig(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=384,
            num_attention_heads=2,
            num_query_groups=2,
            kv_channels=64,
            normalization="RMSNorm",
            layernorm_epsilon=1e-05,
            layernorm_zero_centered_gamma=False,
            qk_layernorm=False,
            qk_l2_norm=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method_std=0.02,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            context_parallel_size=1,
            sequence_parallel=False,
            bf16=False,
            params_dtype=torch.float32,
            pipeline_dtype=torch.float32,
            recompute_granularity=None,
            recompute_modules=None,
            recompute_method=None,
            recompute_num_layers=None,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
            calculate_per_token_loss=True,
        ),
        embedding=dpo.Embedding(
            vocab_size=2048,
            padded_vocab_size=2048,
            sequence_length=256,
            positions="rope",
            rotary_base=500000,
            rotary_scaling=0.0,
            tied=True,
            output_multiplier=1.0,
        ),
        layer_spec="local",
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
            grad_reduce_in_fp32=True,
        ),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=0.0003,
            min_lr=0.0,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-08,
            clip_grad=1.0,
            bf16=False,
            params_dtype=torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=False,
        ),
        groups=dpo.Groups(
            undecayed=(
                "biases",
                "norms",
            ),
            width=1.0,
        ),
        data=dpo.Data(
            path="",
            connector="python-stdlib:preferences",
            too_long="truncate",
            validation=0.04,
            test=0.12,
        ),
        preference=dpo.Preference(beta=0.3, nll=0.5),
        training=dpo.Training(
            epochs=1,
            global_batch=4,
            micro_batch=2,
            schedule="cosine",
            warmup=0.1,
        ),
        checkpoint=dpo.Checkpoint(every_steps=100, keep_last=3),
    )


if __name__ == "__main__":
    main()
