#!/usr/bin/env bash
# The whole story in minutes: distils the small RegNetY that ships with the project into a small DeiT on Fashion-MNIST, then loads the
# exported student with plain timm and shows what it makes of images it has never seen. Arguments go to train.py (optim.lr=5e-4 ...).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
# An interrupted run goes on; a finished one is moved aside and made anew.
resume=auto
if [ -e runs/quickstart/student ]; then resume=none; fi
.venv/bin/python train.py --recipe quickstart --output runs/quickstart --resume "$resume" "$@"
.venv/bin/python launch/quickstart.py runs/quickstart
