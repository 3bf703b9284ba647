#!/usr/bin/env bash
# Makes .venv with the locked packages, or does nothing when it is there already.
#   bash launch/setup.sh          what training needs
#   bash launch/setup.sh dev      also what the tests need
# PYTHON names another interpreter than python3 (3.10 to 3.13).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock="requirements${1:+-$1}.lock"
python="${PYTHON:-python3}"
stamp=".venv/$lock"
if [ -x .venv/bin/python ] && cmp -s "$lock" "$stamp"; then
  exit 0
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
  echo "error: needs Python 3.10 to 3.13, '$python' is not; install one and name it: PYTHON=python3.12 bash $0" >&2
  exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "error: '$python' has no venv module; install it (on Debian: apt-get install python3-venv)" >&2
  exit 1
fi
echo "setting up .venv from $lock: about 6 GB, minutes"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --disable-pip-version-check -r "$lock"
.venv/bin/python -m pip install --disable-pip-version-check --no-deps --editable .  # the command deit-kd
for each in "$lock" requirements.lock; do # the stamps; dev holds the other whole
  cp "$each" .venv/
done
echo "set up; now: source .venv/bin/activate (or run .venv/bin/python and .venv/bin/deit-kd)"
