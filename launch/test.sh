#!/usr/bin/env bash
# Runs the tests in .venv, which it makes first when it is not there: the fast ones, then the slow ones. Arguments go to pytest instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/python -m pytest
.venv/bin/python -m pytest -m slow
