#!/usr/bin/env bash
# Train on all GPUs of this machine:
#
#     examples/multi_gpu.sh experiment=text/stdlib_bytes data.batch_size=16
#     TRAINER=fsdp examples/multi_gpu.sh experiment=text/stdlib_bytes model=language_base
#     TRAINER=ddp examples/multi_gpu.sh experiment=text/stdlib_bytes trainer.accelerator=cpu trainer.devices=2
#
# TRAINER: ddp (a copy of the model on each GPU), fsdp (a part of it on each) or context_parallel (a part of each
# sequence on each). Further words are those of `lightning fit`; data.batch_size is of one GPU. Ctrl-C stops all of them
# after a checkpoint; ckpt_path=last goes on from it.
set -euo pipefail
exec lightning fit "trainer=${TRAINER:-ddp}" "$@"
