#!/usr/bin/env bash
# Runs the whole test suite in .venv, which it makes first when it is not there. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
exec .venv/bin/python -m pytest "$@"
