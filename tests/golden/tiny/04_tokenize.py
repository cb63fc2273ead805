"""Tokenize the documents of tiny into Megatron's .bin and .idx files.

Run:       python 04_tokenize.py
Leaves:    work/tokenize/output/<split>/<source>.bin and .idx
Why:       trainwright explain; every literal below is a leaf of plan.json (run bcd09755)
"""

from trainwright.runtime.stages import tokenize


def main() -> None:
    tokenize.run(
        stage="tokenize",
        inputs="curate",
        tokenizer="tokenizer",
    )


if __name__ == "__main__":
    main()
