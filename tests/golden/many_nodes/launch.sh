#!/usr/bin/env bash
# Executes every stage of llama-8b-h100 in order.
# On each of the 32 nodes: HEAD=<host of node 0> NODE_RANK=<0 to 31> ./launch.sh
# The folder, and the data, must be the same on every node (a shared file system).
# Relative data paths start from the folder where this is called; TRAINWRIGHT_DATA_ROOT says otherwise.
set -euo pipefail
: "${HEAD:?the host name of node 0}" "${NODE_RANK:?the rank of this node}"
export TRAINWRIGHT_DATA_ROOT="${TRAINWRIGHT_DATA_ROOT:-$(cd . && pwd)}"
cd "$(dirname "$0")"
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron-Core: collectives start in the order they were issued

if [ "$NODE_RANK" = 0 ]; then python 01_ingest.py; fi
if [ "$NODE_RANK" = 0 ]; then python 02_curate.py; fi
if [ "$NODE_RANK" = 0 ]; then python 03_tokenizer.py; fi
if [ "$NODE_RANK" = 0 ]; then python 04_tokenize.py; fi
torchrun --nnodes 32 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-conf join_timeout=86400,read_timeout=86400 05_pretrain.py
torchrun --nnodes 32 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-conf join_timeout=86400,read_timeout=86400 06_sft.py
if [ "$NODE_RANK" = 0 ]; then python 07_export.py; fi
