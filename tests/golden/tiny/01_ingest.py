"""Ingest the sources of tiny: one split into train, validation and test documents.

Run:       python 01_ingest.py
Leaves:    work/ingest/output/, the same split for every stage that follows
Why:       trainwright explain; every literal below is a leaf of plan.json (run bcd09755)
"""

from trainwright.runtime.stages import ingest


def main() -> None:
    ingest.run(
        stage="ingest",
        sources=(
            ingest.Source(
                name="code",
                connector="python-stdlib:code",
            ),
            ingest.Source(
                name="prose",
                connector="python-stdlib:prose",
            ),
        ),
        split=ingest.Split(
            validation=0.04,
            test=0.12,
            seed=1234,
        ),
    )


if __name__ == "__main__":
    main()
