#!/usr/bin/env bash
# Everything that needs a GPU, in one command: correctness, then kernels beside their peers, then training.
# Run it in an environment that has seqzoo[samples,plot,dev] and a CUDA build of torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())'
PYTHONSAFEPATH=1 python -m pytest -m gpu -q
python benchmarks/prob_sparse.py --device cuda --dtype bfloat16 --lengths 4096 16384
if [[ -n ${SEQZOO_DATA:-} ]]; then
    python benchmarks/etth1_informer.py --seeds 3 --horizons 24 48
    python benchmarks/etth1_mixers.py
fi
