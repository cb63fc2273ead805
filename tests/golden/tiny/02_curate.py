"""Curate the documents of tiny: filters, duplicates, personal data; what is dropped is counted and shown.

Run:       python 02_curate.py
Leaves:    work/curate/output/, in the split that ingest made; samples of what was dropped in dropped.jsonl
Why:       trainwright explain; every literal below is a leaf of plan.json (run bcd09755)
"""

from trainwright.runtime.stages import curate


def main() -> None:
    curate.run(
        stage="curate",
        inputs="ingest",
        sources=(
            curate.Source(
                name="code",
                filters="code",
                weight=0.8,
            ),
            curate.Source(
                name="prose",
                filters="prose",
                weight=0.2,
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
