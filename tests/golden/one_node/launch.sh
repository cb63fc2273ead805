#!/usr/bin/env bash
# Executes every stage of one-node in order.
# With resume, state and a report instead: trainwright run .   (or: python -m trainwright.runtime run .)
set -euo pipefail
cd "$(dirname "$0")"

python 01_ingest.py
python 02_tokenizer.py
python 03_tokenize.py
torchrun --standalone --nproc-per-node 8 04_pretrain.py
