# What gpu.sh and gpu_training.sh do first: look for a GPU, install what is missing where pip can, find the package.
# Sourced. SEQZOO_WHEELS: a folder of wheels, for a machine without a package index.
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
