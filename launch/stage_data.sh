#!/bin/bash
# Unpack one file, a .tar of a prepared folder, on this node's own disk; once, however many tasks ask:
#   launch/stage_data.sh data/nabirds.tar
set -euo pipefail
archive=$1
disk=${SLURM_TMPDIR:-${TMPDIR:-/tmp}/vit-nabirds-$UID}
name=$(basename "$archive" .tar)
this=$(stat --dereference --format='%n, %s bytes of %y' "$(realpath "$archive")")
mkdir -p "$disk"
exec 9> "$disk/.$name.lock"
flock 9
if [ ! -e "$disk/.$name.staged" ]; then
    tar -xf "$archive" -C "$disk"
    [ -d "$disk/$name" ] || { echo "error: $archive holds no folder $name: tar -cf $name.tar -C FOLDER_ABOVE $name" >&2; exit 1; }
    echo "$this" > "$disk/.$name.staged"
    echo "$(hostname): $archive is unpacked in $disk/$name"
elif [ "$(cat "$disk/.$name.staged")" != "$this" ]; then
    echo "error: $(hostname): $disk/$name is of another archive ($(cat "$disk/.$name.staged")): delete $disk/$name and $disk/.$name.staged" >&2
    exit 1
fi
