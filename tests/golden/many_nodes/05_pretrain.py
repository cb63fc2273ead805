"""Pretrain llama-8b-h100 on 256 x h100-sxm-80gb (tensor 2, data 128).

Run:       torchrun --nnodes 32 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-conf join_timeout=86400,read_timeout=86400 05_pretrain.py
Expected:  1.7 s a step (1.27 to 2.12), 9,663 tokens/s a device, 67.24 GiB of 79.1 GiB, 6.55 days, $84.51k
Why:       trainwright explain; every literal below is a leaf of plan.json (run f37be7b8)
"""

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from trainwright.runtime.stages import pretrain


def main() -> None:
    pretrain.run(
        stage="pretrain",
        run_id="f37be7b8",
        seed=1234,
        parallel=pretrain.Parallel(
            tensor=2,
            pipeline=1,
            virtual_pipeline=1,
            context=1,
            expert=1,
            expert_tensor=1,
            data=128,
        ),
        model=TransformerConfig(
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=14336,
            num_attention_heads=32,
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
            init_method_std=0.0090211,
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=1,
            context_parallel_size=1,
            sequence_parallel=True,
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
            sequence_length=8192,
            positions="rope",
            rotary_base=500000,
            rotary_scaling=0.0,
            tied=False,
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
            lr=0.0003,
            min_lr=3e-05,
            weight_decay=0.139829,
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
            steps=333786,
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
                0.6,
                0.4,
            ),
            global_batch=512,
            micro_batch=2,
            ramp=None,
        ),
        z_loss=0.0,
        validation=pretrain.Validation(
            every_steps=20000,
            sequences=1024,
            baseline="none",
            sample_tokens=48,
        ),
        checkpoint=pretrain.Checkpoint(every_steps=1000, keep_last=3),
    )


if __name__ == "__main__":
    main()
