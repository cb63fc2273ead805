"""Evaluate tiny on held-out data on 2 x cpu (data 2), and hold it against its gates.

Run:       torchrun --standalone --nproc-per-node 2 08_evaluate.py
Leaves:    work/evaluate/output/results.json
Why:       trainwright explain; every literal below is a leaf of plan.json (run bcd09755)
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
        embedding=evaluate.Embedding(
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
        micro_batch=8,
        perplexity=evaluate.Perplexity(
            inputs="tokenize",
            sources=(
                "code",
                "prose",
            ),
            baseline="bigram",
        ),
        conversations=(
            evaluate.Records(
                name="sft",
                path="",
                connector="python-stdlib:questions",
                too_long="truncate",
            ),
        ),
        preferences=(
            evaluate.Records(
                name="dpo",
                path="",
                connector="python-stdlib:preferences",
                too_long="truncate",
            ),
        ),
        tasks=(
            evaluate.Task(
                name="python-summaries",
                path="",
                connector="python-stdlib:choices",
                num_fewshot=0,
            ),
        ),
        gates=(
            evaluate.Gate(
                metric="accuracy/python-summaries",
                threshold=0.25,
            ),
        ),
    )


if __name__ == "__main__":
    main()
