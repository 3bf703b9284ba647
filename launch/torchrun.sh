#!/usr/bin/env bash
# Starts train.py on every GPU of this machine, or of several machines. Arguments go to train.py.
#   bash launch/torchrun.sh --recipe deit_ti --data DIR
#   NNODES=2 NODE_RANK=0 HEAD=host0 bash launch/torchrun.sh --recipe deit_ti --data DIR       and NODE_RANK=1 on the other machine
#   NPROC=2 bash launch/torchrun.sh --device cpu --recipe quickstart                          two processes on a CPU
# PORT is that of HEAD (default 29500), LOCAL_ADDR what the others reach this machine by, if not its name. With MAX_RESTARTS=3 it starts
# all processes again up to three times when one dies, and the run goes on from its newest checkpoint; a machine that is lost can be
# started again by the same command. Ends with 75 when a signal stopped the run and the same command continues it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python

if [[ " $* " == *" --device cpu "* ]] || ! nvidia-smi >/dev/null 2>&1; then
  processes="${NPROC:-1}"
  [ "${NNODES:-1}" != 1 ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" # else a restart may not find its peers
else
  processes="${NPROC:-gpu}"
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart must not read the addresses of the processes that died
if [ "${NNODES:-1}" = 1 ]; then
  meeting=(--rdzv_endpoint "127.0.0.1:${PORT:-0}" --local_addr 127.0.0.1)
else # the first machine is the host; the others find it by name
  meeting=(--rdzv_endpoint "${HEAD:?the first machine}:${PORT:-29500}" --rdzv_conf "is_host=$((NODE_RANK == 0))")
  [ -z "${LOCAL_ADDR:-}" ] || meeting+=(--local_addr "$LOCAL_ADDR")
fi
# What a scheduler sends reaches the training processes, which then save; they get two minutes.
signals="TERM INT USR1"
[ "$(trap -p HUP)" = "trap -- '' SIGHUP" ] || signals="$signals HUP" # what nohup ignores stays ignored
export PET_SIGNALS_TO_HANDLE="SIGQUIT,SIG${signals// /,SIG}" PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-120}"
"$python" -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc_per_node "$processes" --rdzv_backend c10d --rdzv_id "${RUN_ID:-deit_kd}" \
  "${meeting[@]}" --max_restarts "${MAX_RESTARTS:-0}" "$root/train.py" "$@" &
launcher=$!

# The launcher ends with 1 whatever it was sent; the code that asks for another start is given back here.
signalled=no
for name in $signals; do
  trap "signalled=yes; kill -$name $launcher 2>/dev/null || true" "$name"
done
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do # a trapped signal ends `wait` before the launcher ends
  code=0
  wait "$launcher" || code=$?
done
[ "$signalled" = no ] || [ "$code" = 0 ] || exit 75
exit "$code"
