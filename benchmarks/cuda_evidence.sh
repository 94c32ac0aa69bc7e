#!/usr/bin/env bash
# Trains, exports and judges on this machine's GPU and writes what it measured to benchmarks/results/.
# Start it again after an interruption: finished parts are kept. Options: --help.
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/cuda_evidence.py" "$@"
