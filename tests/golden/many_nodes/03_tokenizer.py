"""Train the tokenizer of llama-8b-h100: byte-level BPE on the training split.

Run:       python 03_tokenizer.py
Leaves:    work/tokenizer/output/tokenizer.json
Why:       trainwright explain; every literal below is a leaf of plan.json (run f37be7b8)
"""

from trainwright.runtime.stages import tokenizer


def main() -> None:
    tokenizer.run(
        stage="tokenizer",
        inputs="curate",
        vocab_size=128256,
    )


if __name__ == "__main__":
    main()
