#!/usr/bin/env bash
# Models trained on a GPU, all at once, because each alone waits for its launches most of the time: needles and recall
# after equal training, ListOps with attention, an SSM and a hybrid, and the best hybrid on the standard library.
# About five minutes on an H200 with 16 cores; gpu.sh measures the kernels. Settings of gpu.sh hold here too.
# OUT: folder of logs and runs (default: runs/gpu).
set -euo pipefail
# shellcheck source=benchmarks/_gpu_setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/_gpu_setup.sh"
out=$(mkdir -p "${OUT:-runs/gpu}" && cd "${OUT:-runs/gpu}" && pwd)
export OMP_NUM_THREADS=1

fit() { # NAME override...
    local name=$1
    shift
    python -P -m seqzoo fit "$@" name="$name" paths.runs="$out/fits" callbacks.progress=plain >"$out/$name.log" 2>&1 ||
        echo "gpu_training.sh: $name failed, see $out/$name.log"
}

models=(softmax mamba2 gla hybrid)
for model in "${models[@]}"; do
    python benchmarks/long_context.py --device cuda --models "$model" --steps 4000 --minutes 4 --out "$out/$model" \
        >"$out/$model.log" 2>&1 || echo "gpu_training.sh: $model failed, see $out/$model.log" &
done
listops=(experiment=lra/listops trainer.precision=bf16-mixed trainer.max_epochs=3)
fit listops_softmax "${listops[@]}" mixer=softmax &
fit listops_s4d "${listops[@]}" mixer=s4d &
fit listops_hybrid "${listops[@]}" model=hybrid_classifier_small &
fit stdlib_hybrid experiment=text/stdlib_hybrid model.dim=384 model.depth=6 data.batch_size=48 data.steps=300 \
    optimizer.adam_lr=5e-3 &
wait
python benchmarks/long_context.py --merge "${models[@]/#/$out/}"
python -P -m seqzoo lra runs="$out/fits" || true
tail -n 12 "$out"/stdlib_hybrid.log
echo "logs and runs: $out; the table: $PWD/benchmarks/results/long_context.md"
