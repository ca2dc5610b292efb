#!/bin/bash
# The test on a real SLURM, from a fresh Debian: installs slurm-wlm and munge where they are missing. As root.
# Where that cannot be, the test is skipped with its reason. `make slurm-test` calls this.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
if ! command -v slurmctld >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1 ||
    echo "slurm-wlm and munge cannot be installed here" >&2
fi
exec "${PYTHON:-.venv/bin/python}" -m pytest -q -rs -m slurm tests/test_slurm.py
