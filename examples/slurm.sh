#!/usr/bin/env bash
# Train on several machines of a SLURM cluster, one task for each GPU:
#
#     sbatch examples/slurm.sh experiment=text/stdlib_bytes data.batch_size=16
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --export=ALL,TRAINER=fsdp examples/slurm.sh experiment=...
#
# Tasks and GPUs of a node must be as many. The run folder, paths.runs, must be on a disk that all nodes see; its name is
# that of the job. A job that ended before its run goes on with ckpt_path=last and the same number of GPUs.
#SBATCH --job-name=seqzoo
#SBATCH --nodes=1
#SBATCH --gpus-per-node=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
exec srun lightning fit \
    "trainer=${TRAINER:-ddp}" \
    "trainer.devices=$SLURM_NTASKS_PER_NODE" \
    "trainer.num_nodes=$SLURM_JOB_NUM_NODES" \
    callbacks.progress=plain \
    "$@"
