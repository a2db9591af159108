#!/usr/bin/env bash
# One fine-tuning run over several nodes of a SLURM cluster: one torchrun a node, which starts one process a GPU.
#   sbatch --nodes=2 --gpus-per-node=8 scripts/launch_slurm.sh configs/ner.yaml train.batch_size=256
# The folder of heedful, its .venv and its assets must be seen by all nodes; run `make assets TASK=...` before.
#SBATCH --job-name=heedful
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120  # two minutes before the time is up: the run saves and ends with 143; resume=auto goes on
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?run this by sbatch}"
# Not by a pipe to `head`, which closes early: pipefail would then end the job of a scontrol still writing.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))

exec srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$head:$port" \
    --rdzv_id="$SLURM_JOB_ID" \
    -m pipelines.cli finetune "$@"
