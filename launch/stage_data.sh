#!/bin/bash
# Unpack one file, a .tar of a prepared folder, on this node's own disk; once, however many tasks ask:
#   launch/stage_data.sh data/nabirds.tar
set -euo pipefail
archive=$1
disk=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
name=$(basename "$archive" .tar)
exec 9> "$disk/.$name.lock"
flock 9
if [ ! -e "$disk/.$name.staged" ]; then
    tar -xf "$archive" -C "$disk"
    [ -d "$disk/$name" ] || { echo "error: $archive holds no folder $name: tar -cf $name.tar -C FOLDER_ABOVE $name" >&2; exit 1; }
    touch "$disk/.$name.staged"
    echo "$(hostname): $archive is unpacked in $disk/$name"
fi
