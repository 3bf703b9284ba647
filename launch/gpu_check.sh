#!/usr/bin/env bash
# The GPU's tests and benchmarks, in calls of at most ten minutes: bash launch/gpu_check.sh FOLDER [--device cpu --quick]; give it again while it
# ends with code 75. PYTHON names another interpreter than .venv's, which has the packages of requirements-dev.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m benchmarks.gpu_check "$@"
