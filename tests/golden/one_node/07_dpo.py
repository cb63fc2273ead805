"""Align one-node with preferences (DPO) on 8 x h100-sxm-80gb (data 8).

Run:       torchrun --standalone --nproc-per-node 8 07_dpo.py
Leaves:    work/dpo/checkpoints/, and the accuracy on pairs before and after in output/summary.json
Why:       trainwright explain; every literal below is a leaf of plan.json (run cedc97ee)
"""

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from trainwright.runtime.stages import dpo


def main() -> None:
    dpo.run(
        stage="dpo",
        run_id="cedc97ee",
        seed=1234,
        initial="sft",
        parallel=dpo.Parallel(
            tensor=1,
            pipeline=1,
            virtual_pipeline=1,
            context=1,
            expert=1,
            expert_tensor=1,
            data=8,
        ),
        model=TransformerConfig(
            num_layers=26,
            hidden_size=3072,
            ffn_hidden_size=8192,
            num_attention_heads=24,
            num_query_groups=8,
            kv_channels=128,
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
            init_method_std=0.0104167,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            context_parallel_size=1,
            sequence_parallel=False,
            bf16=True,
            params_dtype=torch.bfloat16,
            pipeline_dtype=torch.bfloat16,
            recompute_granularity=None,
            recompute_modules=None,
            recompute_method=None,
            recompute_num_layers=None,
            bias_activation_fusion=True,
            bias_dropout_fusion=True,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=True,
            calculate_per_token_loss=True,
        ),
        embedding=dpo.Embedding(
            vocab_size=128256,
            padded_vocab_size=128256,
            sequence_length=4096,
            positions="rope",
            rotary_base=500000,
            rotary_scaling=0.0,
            tied=True,
            output_multiplier=1.0,
        ),
        layer_spec="transformer_engine",
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            grad_reduce_in_fp32=True,
        ),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=1.05105e-06,
            min_lr=0.0,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-08,
            clip_grad=1.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
        ),
        groups=dpo.Groups(
            undecayed=(
                "biases",
                "norms",
            ),
            width=1.0,
        ),
        data=dpo.Data(
            path="pairs/*.jsonl",
            connector="",
            too_long="truncate",
            validation=0.04,
            test=0.12,
        ),
        preference=dpo.Preference(beta=0.1, nll=0.0),
        training=dpo.Training(
            epochs=1,
            global_batch=128,
            micro_batch=2,
            schedule="cosine",
            warmup=0.1,
        ),
        checkpoint=dpo.Checkpoint(every_steps=100, keep_last=3),
    )


if __name__ == "__main__":
    main()
