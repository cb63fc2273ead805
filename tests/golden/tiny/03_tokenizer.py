"""Train the tokenizer of tiny: byte-level BPE on the training split.

Run:       python 03_tokenizer.py
Leaves:    work/tokenizer/output/tokenizer.json
Why:       trainwright explain; every literal below is a leaf of plan.json (run bcd09755)
"""

from trainwright.runtime.stages import tokenizer


def main() -> None:
    tokenizer.run(
        stage="tokenizer",
        inputs="curate",
        vocab_size=2048,
    )


if __name__ == "__main__":
    main()
