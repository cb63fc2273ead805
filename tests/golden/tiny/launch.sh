#!/usr/bin/env bash
# Executes every stage of tiny in order.
# With resume, state and a report instead: trainwright run .   (or: python -m trainwright.runtime run .)
set -euo pipefail
cd "$(dirname "$0")"

python 01_ingest.py
python 02_tokenizer.py
python 03_tokenize.py
torchrun --standalone --nproc-per-node 2 04_pretrain.py
