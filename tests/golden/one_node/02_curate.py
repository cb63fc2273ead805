"""Curate the documents of one-node: filters, duplicates, personal data; what is dropped is counted and shown.

Run:       python 02_curate.py
Leaves:    work/curate/output/, in the split that ingest made; samples of what was dropped in dropped.jsonl
Why:       trainwright explain; every literal below is a leaf of plan.json (run 54a81493)
"""

from trainwright.runtime.stages import curate


def main() -> None:
    curate.run(
        stage="curate",
        inputs="ingest",
        sources=(
            curate.Source(
                name="web",
                filters="prose",
                weight=0.7,
            ),
            curate.Source(
                name="code",
                filters="code",
                weight=0.3,
            ),
        ),
        deduplicate=curate.Deduplicate(
            exact=True,
            near_threshold=0.8,
            permutations=128,
            shingle_words=5,
        ),
        scrub=(
            "email",
            "ip",
            "card",
            "iban",
        ),
        seed=1234,
    )


if __name__ == "__main__":
    main()
