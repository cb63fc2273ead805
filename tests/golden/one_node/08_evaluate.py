"""Evaluate one-node on held-out data on 8 x h100-sxm-80gb (data 8), and hold it against its gates.

Run:       torchrun --standalone --nproc-per-node 8 08_evaluate.py
Leaves:    work/evaluate/output/results.json
Why:       trainwright explain; every literal below is a leaf of plan.json (run 54a81493)
"""

import torch
from megatron.core.transformer import TransformerConfig
from trainwright.runtime.stages import evaluate


def main() -> None:
    evaluate.run(
        stage="evaluate",
        seed=1234,
        initial="dpo",
        compare=(
            "pretrain",
            "sft",
        ),
        parallel=evaluate.Parallel(
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
        embedding=evaluate.Embedding(
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
        micro_batch=4,
        perplexity=evaluate.Perplexity(
            inputs="tokenize",
            sources=(
                "web",
                "code",
            ),
            baseline="none",
        ),
        conversations=(
            evaluate.Records(
                name="sft",
                path="chat/*.jsonl",
                connector="",
                too_long="truncate",
            ),
        ),
        preferences=(
            evaluate.Records(
                name="dpo",
                path="pairs/*.jsonl",
                connector="",
                too_long="truncate",
            ),
        ),
        tasks=(),
        gates=(),
    )


if __name__ == "__main__":
    main()
