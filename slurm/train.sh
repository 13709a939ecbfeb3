#!/bin/bash
# Trains on one or many nodes: one torchrun per node, one process per GPU.
#
#   sbatch slurm/train.sh
#   CONFIG=configs/ti2v_5b.json sbatch --nodes=4 slurm/train.sh --set train.max_steps=100
#
# Options of sbatch stand before the script and override the lines below; what follows the script
# goes to launch/train.py. From the environment: CONFIG, PYTHON, NPROC (processes per node; the
# node's GPUs, or 1), RETRIES (how often the job may start anew after a failure; 0), MASTER_ADDR,
# MASTER_PORT. Submit from the repository's root. More: docs/slurm.md.
#
#SBATCH --job-name=tempolora-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Five minutes before the time is up this script (B:) hears USR1.
#SBATCH --signal=B:USR1@300
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --mem=0
set -euo pipefail
stopping=0
trap 'stopping=1' USR1 # early: from here on it must not end this script

# --- Your cluster: uncomment what applies --------------------------------------------------------
# module load cuda
# source .venv/bin/activate
# export NCCL_SOCKET_IFNAME=ib0 NCCL_DEBUG=WARN
srun_args=(--ntasks-per-node=1 --kill-on-bad-exit=1)
# srun_args+=(--container-image=/images/tempolora.sqsh --container-mounts="$PWD" --container-workdir="$PWD")
# -------------------------------------------------------------------------------------------------

# Slurm runs a copy of this file, so its own place says nothing about the repository's.
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f launch/train.py ]]; then
  echo "launch/train.py is not in $PWD: submit from the repository's root" >&2
  exit 2
fi
export CONFIG="${CONFIG:-configs/a14b.json}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -z "${VIRTUAL_ENV:-}" && -x .venv/bin/python ]]; then PYTHON="$PWD/.venv/bin/python"; fi
fi
export PYTHON
restarts="${SLURM_RESTART_COUNT:-0}"
# A job that comes back goes on: `--resume none` is meant for its first start. The last one counts.
if ((restarts > 0)); then set -- "$@" --resume auto; fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The port follows from the job, so that two jobs on one host do not meet, and stays below the
# range that the kernel hands out by itself.
export MASTER_ADDR="${MASTER_ADDR:-${hosts[0]}}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
# srun no longer takes this over from sbatch by itself.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

echo "job:     $SLURM_JOB_ID, start $((restarts + 1)), $(date -Is)${SLURM_JOB_END_TIME:+, at most until $(date -Is -d "@$SLURM_JOB_END_TIME")}"
echo "nodes:   ${#hosts[@]} (${hosts[*]}), meeting at $MASTER_ADDR:$MASTER_PORT"
echo "gpus:    ${SLURM_GPUS_ON_NODE:-0} per node; $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sort | uniq -c | xargs || true)"
echo "commit:  $(git describe --always --dirty 2>/dev/null || echo unknown)"
echo "python:  $("$PYTHON" --version) ($PYTHON)"
echo "config:  $CONFIG $*"

# One node's share, run by srun; the arguments arrive as "$@". torchrun would die of USR1 and take
# the training with it, so it is told to ignore it; the trainer sets its own handler over that.
# is_host: torchrun otherwise guesses from host names which node is the meeting point.
node='
  trap "" USR1
  nproc="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
  if ((nproc < 1)); then nproc=1; fi
  threads=$((${SLURM_CPUS_PER_TASK:-1} / nproc))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$nproc" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
    launch/train.py --config "$CONFIG" "$@"
'

srun "${srun_args[@]}" bash -c "$node" tempolora "$@" &
step=$!

# USR1 goes on to all processes of the step: the trainer saves and ends. While a model loads nobody
# listens, so it is said again until the step has ended.
repeater=
pass_on() {
  stopping=1
  if [[ -n "$repeater" ]]; then return; fi
  while true; do
    scancel --signal=USR1 "$SLURM_JOB_ID" || true
    sleep 20
  done >/dev/null 2>&1 &
  repeater=$!
}
trap pass_on USR1
if ((stopping)); then pass_on; fi
interrupted=138 # 128 + USR1: what wait answers when the signal interrupts it
status=$interrupted
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done
if ((status == interrupted)); then
  status=0
  wait "$step" || status=$?
fi
if [[ -n "$repeater" ]]; then kill "$repeater" || true; fi

# The trainer resumes by itself from its last checkpoint (--resume auto).
again=
if ((stopping && status == 0)); then
  again="stopped before the time was up"
elif ((status != 0 && restarts < ${RETRIES:-0})); then
  again="failed with status $status, start $((restarts + 1)); RETRIES=$RETRIES"
fi
if [[ -n "$again" ]]; then
  echo "$again; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || echo "Slurm refused: submit the same command again" >&2
fi
exit "$status"
