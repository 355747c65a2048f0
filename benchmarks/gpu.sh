#!/usr/bin/env bash
# Everything that needs a GPU, in one command: what is missing is installed where pip can, then correctness, then kernels
# beside their peers, then training.
# Needs Python with a CUDA build of torch. SEQZOO_WHEELS: a folder of wheels, for a machine without a package index.
# SEQZOO_DATA: the folder with ETTh1.csv, for the training runs; without it they are left out. Arguments go to gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())'

# --no-deps: nothing may replace the torch and triton that are here. A package that does not come is named, and what
# needs it (a test, a peer) says so itself.
pip_options=(--quiet --disable-pip-version-check --no-deps)
if [[ -n ${SEQZOO_WHEELS:-} ]]; then
    pip_options+=(--no-index --find-links "$SEQZOO_WHEELS")
fi
while read -r module requirement; do
    find="import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)"
    python -c "$find" </dev/null 2>/dev/null && continue
    python -m pip install "${pip_options[@]}" "$requirement" </dev/null ||
        echo "gpu.sh: $requirement could not be installed"
done <<'PACKAGES'
antlr4 antlr4-python3-runtime==4.9.3
omegaconf omegaconf
hydra hydra-core
lightning lightning
lightning_utilities lightning-utilities
torchmetrics torchmetrics
pytorch_lightning pytorch-lightning
safetensors safetensors
rich rich
markdown_it markdown-it-py
mdurl mdurl
pygments Pygments
pytest pytest
pluggy pluggy
iniconfig iniconfig
einops einops
fla flash-linear-attention
fla.ops fla-core
decord decord
pvlib pvlib
PACKAGES

# The package as it stands here, installed or not: the same map as an installation has, as links.
if ! python -P -c 'import seqzoo.kernels' 2>/dev/null; then
    mkdir -p build/typings/seqzoo
    for path in seqzoo/*.py seqzoo/py.typed zoo blocks kernels pipelines conf model_cards; do
        ln -sfn "../../../$path" "build/typings/seqzoo/$(basename "$path")"
    done
    export PYTHONPATH="$PWD/build/typings${PYTHONPATH:+:$PYTHONPATH}"
    python -P -c 'import seqzoo.kernels'
fi

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
