#!/usr/bin/env bash
# Executes every stage of one-node in order.
# With resume, state and a report instead: trainwright run .   (or: python -m trainwright.runtime run .)
# Relative data paths start from the folder where this is called; TRAINWRIGHT_DATA_ROOT says otherwise.
set -euo pipefail
export TRAINWRIGHT_DATA_ROOT="${TRAINWRIGHT_DATA_ROOT:-$(cd . && pwd)}"
cd "$(dirname "$0")"
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron-Core: collectives start in the order they were issued

python 01_ingest.py
python 02_tokenizer.py
python 03_tokenize.py
torchrun --standalone --nproc-per-node 8 04_pretrain.py
