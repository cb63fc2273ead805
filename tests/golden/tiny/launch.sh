#!/usr/bin/env bash
# Executes every stage of tiny in order.
# With resume, state and a report instead: trainwright run .   (or: python -m trainwright.runtime run .)
# Relative data paths start from the folder where this is called; TRAINWRIGHT_DATA_ROOT says otherwise.
set -euo pipefail
export TRAINWRIGHT_DATA_ROOT="${TRAINWRIGHT_DATA_ROOT:-$(cd . && pwd)}"
cd "$(dirname "$0")"
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron-Core: collectives start in the order they were issued

python 01_ingest.py
python 02_curate.py
python 03_tokenizer.py
python 04_tokenize.py
torchrun --standalone --nproc-per-node 2 05_pretrain.py
torchrun --standalone --nproc-per-node 2 06_sft.py
torchrun --standalone --nproc-per-node 2 07_dpo.py
torchrun --standalone --nproc-per-node 2 08_evaluate.py
python 09_export.py
