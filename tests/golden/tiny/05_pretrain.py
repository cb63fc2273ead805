"""Pretrain tiny on 2 x cpu (data 2).

Run:       torchrun --standalone --nproc-per-node 2 05_pretrain.py
Expected:  0.268 s a step (0.201 to 0.334), 7,654 tokens/s a device, 644.5 MiB of 11.2 GiB, 3.158 minutes
Why:       trainwright explain; every literal below is a leaf of plan.json (run bcd09755)
"""

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from trainwright.runtime.stages import pretrain


def main() -> None:
    pretrain.run(
        stage="pretrain",
        run_id="bcd09755",
        seed=1234,
        parallel=pretrain.Parallel(
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
        ),
        embedding=pretrain.Embedding(
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
            lr=0.003,
            min_lr=0.0003,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-08,
            clip_grad=1.0,
            bf16=False,
            params_dtype=torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=False,
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
            steps=708,
            warmup_steps=35,
            decay_steps=0,
            decay_style="none",
        ),
        data=pretrain.Data(
            inputs="tokenize",
            tokenizer="tokenizer",
            split="ingest",
            sources=(
                "code",
                "prose",
            ),
            weights=(
                0.8,
                0.2,
            ),
            global_batch=16,
            micro_batch=8,
            ramp=None,
        ),
        z_loss=0.0,
        validation=pretrain.Validation(
            every_steps=50,
            sequences=16,
            baseline="bigram",
            sample_tokens=48,
        ),
        checkpoint=pretrain.Checkpoint(every_steps=100, keep_last=3),
    )


if __name__ == "__main__":
    main()
