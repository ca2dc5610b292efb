#!/bin/bash
# One stage by all tasks of this job: launch.sh STAGE [flags]. Submit from the checkout; it goes on after an interruption.
#
# SIGUSR1 (`--signal`, before the time limit) and SIGTERM (preemption) make a stage leave with what it has saved; the job
# then puts itself back into the queue, and its next start goes on. PYTHON names the interpreter, by default .venv's.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python; }
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}" PYTHONUNBUFFERED=1

srun --kill-on-bad-exit=1 "$PYTHON" -m ftp_lightning "$@"
code=$?
if { [ "$code" = 138 ] || [ "$code" = 143 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
  echo "interrupted (exit status $code); back into the queue" >&2
  scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" &&
    sleep 600 # until SLURM ends this start: an exit of our own would be taken for the job's end
fi
exit "$code"
