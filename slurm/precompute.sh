#!/bin/bash
# Encodes the clips into shards: one process per GPU, on one or many nodes, or as a job array.
#
#   sbatch slurm/precompute.sh
#   CONFIG=configs/ti2v_5b.json sbatch --array=0-15 slurm/precompute.sh --set data.source=clips
#
# Options of sbatch stand before the script and override the lines below; what follows the script
# goes to launch/precompute.py. From the environment: CONFIG, PYTHON. Submit from the repository's
# root. The processes share the work by clip and need not talk to each other; what is done already
# is skipped, so a job that was stopped is simply submitted again.
#
#SBATCH --job-name=tempolora-precompute
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

# --- Your cluster: uncomment what applies --------------------------------------------------------
# module load cuda
# source .venv/bin/activate
srun_args=(--kill-on-bad-exit=0) # one process's bad clip does not stop the others
# srun_args+=(--container-image=/images/tempolora.sqsh --container-mounts="$PWD" --container-workdir="$PWD")
# -------------------------------------------------------------------------------------------------

# Slurm runs a copy of this file, so its own place says nothing about the repository's.
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -f launch/precompute.py ]]; then
  echo "launch/precompute.py is not in $PWD: submit from the repository's root" >&2
  exit 2
fi
export CONFIG="${CONFIG:-configs/a14b.json}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -z "${VIRTUAL_ENV:-}" && -x .venv/bin/python ]]; then PYTHON="$PWD/.venv/bin/python"; fi
fi
export PYTHON
# srun no longer takes this over from sbatch by itself.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# A job array splits the clips once more: job i of n holds ranks i*ntasks up to (i+1)*ntasks.
first="${SLURM_ARRAY_TASK_MIN:-0}" stride="${SLURM_ARRAY_TASK_STEP:-1}"
export ARRAY_INDEX=$(((${SLURM_ARRAY_TASK_ID:-0} - first) / stride))
export ARRAY_COUNT="${SLURM_ARRAY_TASK_COUNT:-1}"

echo "job:     $SLURM_JOB_ID, part $((ARRAY_INDEX + 1)) of $ARRAY_COUNT, $(date -Is)"
echo "nodes:   $SLURM_JOB_NODELIST"
echo "gpus:    ${SLURM_GPUS_ON_NODE:-0} per node; $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sort | uniq -c | xargs || true)"
echo "commit:  $(git describe --always --dirty 2>/dev/null || echo unknown)"
echo "python:  $("$PYTHON" --version) ($PYTHON)"
echo "config:  $CONFIG $*"

# One process's share, run by srun; the arguments arrive as "$@". Where Slurm shows a process all
# GPUs of the node it keeps one of them, which is then its device 0.
process='
  export RANK=$((ARRAY_INDEX * SLURM_NTASKS + SLURM_PROCID))
  export WORLD_SIZE=$((ARRAY_COUNT * SLURM_NTASKS)) LOCAL_RANK="$SLURM_LOCALID"
  if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    export CUDA_VISIBLE_DEVICES="${devices[SLURM_LOCALID % ${#devices[@]}]}" LOCAL_RANK=0
  fi
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
  exec "$PYTHON" launch/precompute.py --config "$CONFIG" "$@"
'
exec srun "${srun_args[@]}" bash -c "$process" tempolora "$@"
