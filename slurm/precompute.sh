#!/bin/bash
# Encodes the clips into shards: one process per GPU, on one or many nodes, or as a job array.
#
#   sbatch slurm/precompute.sh
#   CONFIG=configs/ti2v_5b.json sbatch --array=0-15%4 slurm/precompute.sh --set data.source=clips
#   PARTS=16 sbatch --array=3,7 slurm/precompute.sh     # two of these parts once more
#
# Options of sbatch stand before the script and override the lines below; what follows the script
# goes to launch/precompute.py. From the environment: CONFIG, PYTHON, PARTS (how many parts the clips
# are split into; as many as the array has jobs). Submit from the repository's root. The processes
# share the work by clip and need not talk to each other; what is done already is skipped, so a job
# that was stopped goes back into the queue, or is submitted again. More: docs/slurm.md.
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
# Two minutes before the time is up this script (B:) hears USR1.
#SBATCH --signal=B:USR1@120
##SBATCH --partition=gpu
##SBATCH --account=project
set -euo pipefail
stopping=0
trap 'stopping=1' USR1 # early: from here on it must not end this script

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

# A job array splits the clips once more: part i of n holds ranks i*ntasks up to (i+1)*ntasks. Of an
# array with gaps, which is one of an earlier array's parts again, the number is the part.
first="${SLURM_ARRAY_TASK_MIN:-0}" last="${SLURM_ARRAY_TASK_MAX:-0}"
stride="${SLURM_ARRAY_TASK_STEP:-1}" count="${SLURM_ARRAY_TASK_COUNT:-1}"
export PART=$(((${SLURM_ARRAY_TASK_ID:-0} - first) / stride))
if [[ -n "${PARTS:-}" ]]; then
  PART="${SLURM_ARRAY_TASK_ID:-0}"
elif (((last - first) / stride + 1 != count)); then
  echo "the array has gaps: say with PARTS how many parts the whole one had" >&2
  exit 2
fi
export PARTS="${PARTS:-$count}"
if ((PART >= PARTS)); then
  echo "there is no part $PART of PARTS=$PARTS: they are counted from 0" >&2
  exit 2
fi

echo "job:     $SLURM_JOB_ID, part $PART of $PARTS, $(date -Is)"
echo "nodes:   $SLURM_JOB_NODELIST"
echo "gpus:    ${SLURM_GPUS_ON_NODE:-0} per node; $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sort | uniq -c | xargs || true)"
echo "commit:  $(git describe --always --dirty 2>/dev/null || echo unknown)"
echo "python:  $("$PYTHON" --version) ($PYTHON)"
echo "config:  $CONFIG $*"

# One process's share, run by srun; the arguments arrive as "$@". Where Slurm shows a process all
# GPUs of the node it keeps one of them, which is then its device 0.
process='
  export RANK=$((PART * SLURM_NTASKS + SLURM_PROCID))
  export WORLD_SIZE=$((PARTS * SLURM_NTASKS)) LOCAL_RANK="$SLURM_LOCALID"
  if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    export CUDA_VISIBLE_DEVICES="${devices[SLURM_LOCALID % ${#devices[@]}]}" LOCAL_RANK=0
  fi
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
  exec "$PYTHON" launch/precompute.py --config "$CONFIG" "$@"
'
srun "${srun_args[@]}" bash -c "$process" tempolora "$@" &
step=$!

# USR1 becomes the end of the step, whose finished shards stay; the rest is done by the next start.
end_step() {
  stopping=1
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap end_step USR1
if ((stopping)); then end_step; fi
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
if ((stopping && status != 0)); then
  echo "stopped before the time was up; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || echo "Slurm refused: submit the same command again" >&2
fi
exit "$status"
