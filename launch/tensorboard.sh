#!/bin/bash
# TensorBoard for this machine alone, and the ssh command that opens a tunnel to it.
#   launch/tensorboard.sh [FOLDER OF RUNS] [PORT]
set -euo pipefail
runs=${1:-runs}
port=${2:-$((16006 + UID % 1000))}
source "${VENV:-.venv}/bin/activate"
[ -d "$runs" ] || { echo "error: there is no folder $runs" >&2; exit 1; }
echo "On your own machine:  ssh -N -L $port:localhost:$port $USER@$(hostname -f)"
echo "    (to a compute node: add -J $USER@LOGIN_NODE), then open http://localhost:$port"
exec tensorboard --logdir="$runs" --host=localhost --port="$port"
