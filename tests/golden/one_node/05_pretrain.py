"""Pretrain one-node on 8 x h100-sxm-80gb (data 8).

Run:       torchrun --standalone --nproc-per-node 8 05_pretrain.py
Expected:  3.7 s a step (2.77 to 4.62), 26,574 tokens/s a device, 73.77 GiB of 79.1 GiB, 3 days, $1210
Why:       trainwright explain; every literal below is a leaf of plan.json (run 54a81493)
"""

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from trainwright.runtime.stages import pretrain


def main() -> None:
    pretrain.run(
        stage="pretrain",
        run_id="54a81493",
        seed=1234,
        parallel=pretrain.Parallel(
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
        ),
        embedding=pretrain.Embedding(
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
            lr=0.000683883,
            min_lr=6.83883e-05,
            weight_decay=0.089076,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-08,
            clip_grad=1.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
        ),
        groups=pretrain.Groups(
            undecayed=(
                "biases",
                "norms",
            ),
            width=1.0,
        ),
        schedule=pretrain.Schedule(
            kind="cosine",
            steps=70067,
            warmup_steps=2000,
            decay_steps=0,
            decay_style="none",
        ),
        data=pretrain.Data(
            inputs="tokenize",
            tokenizer="tokenizer",
            split="ingest",
            sources=(
                "web",
                "code",
            ),
            weights=(
                0.7,
                0.3,
            ),
            global_batch=192,
            micro_batch=4,
            ramp=None,
        ),
        z_loss=0.0,
        validation=pretrain.Validation(
            every_steps=5000,
            sequences=1024,
            baseline="none",
            sample_tokens=48,
        ),
        checkpoint=pretrain.Checkpoint(every_steps=200, keep_last=3),
    )


if __name__ == "__main__":
    main()
