#!/usr/bin/env bash
# One fine-tuning run over several nodes of a SLURM cluster: one torchrun a node, which starts one process a GPU.
#   sbatch --nodes=2 --gpus-per-node=8 --time=8:00:00 scripts/launch_slurm.sh configs/ner.yaml train.batch_size=256
# The folder of heedful, its .venv and its assets must be seen by all nodes; run `make assets TASK=...` before.
# A run that is longer than --time goes on in the same job, as often as it takes; so it does after a lost node.
#SBATCH --job-name=heedful
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?run this by sbatch}"
# Not by a pipe to `head`, which closes early: pipefail would then end the job of a scontrol still writing.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))

# Three minutes before the time is up SLURM sends USR1 to this script alone, which sends TERM to the torchruns, and they to
# the ranks: those save after the update at hand. Else torchrun would kill them after 30 s, in a long update or save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150
told=
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$head:$port" \
    --rdzv_id="$SLURM_JOB_ID" \
    -m pipelines.cli finetune "$@" ${SLURM_RESTART_COUNT:+resume=auto} &
step=$!
wait "$step" && code=0 || code=$?
if [ "$code" -eq $((128 + $(kill -l USR1))) ]; then # USR1 ended the wait, not the step
    wait "$step" && code=0 || code=$?
fi

# By itself SLURM requeues after a lost node, but not at the time limit. torchrun ends with 1 whatever its ranks end with,
# so that the code does not tell a run that was stopped; nor would TERM, which comes of `scancel` too.
if [ -n "$told" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
