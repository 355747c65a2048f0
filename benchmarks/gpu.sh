#!/usr/bin/env bash
# Everything that needs a GPU, in one command: what is missing is installed where pip can, then correctness, then kernels
# beside their peers, then training.
# Needs Python with a CUDA build of torch. SEQZOO_WHEELS: a folder of wheels, for a machine without a package index.
# SEQZOO_DATA: the folder with ETTh1.csv, for the training runs; without it they are left out. Arguments go to gpu.py.
set -euo pipefail
# shellcheck source=benchmarks/_gpu_setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/_gpu_setup.sh"

# Compiling is most of the time: the tests go in parallel where pytest-xdist is, and every operation is measured once for
# nothing beside the others, which leaves its compiled kernels in Triton's cache. Other kernels may still tune
# themselves for each shape while they are measured.
parallel=()
if python -c 'import xdist' 2>/dev/null; then
    parallel=(-n "$(nproc --ignore=2)" --dist worksteal)
fi
tests=0
PYTHONSAFEPATH=1 python -m pytest -m gpu -q ${parallel[@]+"${parallel[@]}"} tests/kernels tests/blocks || tests=$?
warm=$(mktemp -d)
trap 'rm -rf "$warm"' EXIT
for operation in $(python benchmarks/gpu.py --list "$@" | cut -d'|' -f1 | sort -u); do
    timeout 120 python benchmarks/gpu.py "$@" --only "$operation" --rounds 1 --out "$warm/$operation" >/dev/null 2>&1 &
done
wait
python benchmarks/gpu.py "$@"
python benchmarks/prob_sparse.py --device cuda --dtype bfloat16 --lengths 4096 16384
if [[ -n ${SEQZOO_DATA:-} ]]; then
    python benchmarks/etth1_informer.py --seeds 3 --horizons 24 48
    python benchmarks/etth1_mixers.py
fi
echo "results: $PWD/benchmarks/results/gpu.md, gpu.json and prob_sparse_cuda.json"
if ((tests)); then
    echo "the GPU tests failed, see above"
fi
exit "$tests"
