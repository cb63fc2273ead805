"""Train the tokenizer of tiny: byte-level BPE on the training split.

Run:       python 02_tokenizer.py
Leaves:    work/tokenizer/output/tokenizer.json
Why:       trainwright explain; every literal below is a leaf of plan.json (run db81f7ed)
"""

from trainwright.runtime.stages import tokenizer


def main() -> None:
    tokenizer.run(
        stage="tokenizer",
        inputs="ingest",
        vocab_size=2048,
    )


if __name__ == "__main__":
    main()
