#!/bin/bash
# A study as job arrays: one element per budget, and search -> train -> finetune -> evaluate, each element after its own
# stage before. Flags are those that all four stages know.
#
#   BUDGETS="0.2 0.3 0.4" RUNS=$HOME/runs/llama experiments/slurm/study.sh --model M --data D
#   SBATCH="--partition a100 --account me" adds options of sbatch.
set -euo pipefail
export BUDGETS=${BUDGETS:-0.2 0.3 0.4 0.6} RUNS=${RUNS:-runs/study}
read -ra budgets <<<"$BUDGETS"
read -ra options <<<"${SBATCH:-}"
after=()
for stage in search train finetune evaluate; do
  job=$(sbatch --parsable --array "0-$((${#budgets[@]} - 1))" --job-name "ftp-$stage" --kill-on-invalid-dep=yes \
    "${after[@]}" "${options[@]}" experiments/slurm/element.sbatch "$stage" "$@")
  echo "$stage: job $job"
  after=(--dependency "aftercorr:${job%%;*}")
done
