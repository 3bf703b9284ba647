#!/usr/bin/env bash
#SBATCH --job-name=deit_kd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@180
# One task a node starts launch/torchrun.sh there. Submit from the project's folder; arguments go to train.py, and options before the
# script's name change the lines above:
#   sbatch --nodes=1 launch/slurm.sh --recipe deit_ti --data /data/imagenet --output runs/deit_ti
# Three minutes before the time limit the run saves, and the job goes back into the queue; so it does when the job is preempted.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

export NNODES="$SLURM_JOB_NUM_NODES" MAX_RESTARTS=3 RUN_ID="$SLURM_JOB_ID"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
HEAD="${HEAD%%$'\n'*}" # not `| head`: where head ends first, scontrol dies of SIGPIPE and this script with it
PORT="$((20000 + SLURM_JOB_ID % 20000))" # two jobs on a node do not meet
export HEAD PORT

requeue=no
forward() {
  requeue=yes
  kill -USR1 "$step" 2>/dev/null || true # srun hands it to the tasks
}
trap forward USR1

# The node's rank is known on the node alone: single quotes.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash launch/torchrun.sh "$@"' torchrun "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait` before the step ends
  code=0
  wait "$step" || code=$?
done
if [ "$requeue" = yes ] || [ "$code" = 75 ]; then
  echo "stopped by a signal; requeueing job $SLURM_JOB_ID"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
