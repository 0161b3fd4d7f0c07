#!/bin/bash
# A prepared folder, packed or in a .tar, comes to this node's own disk; once, however many tasks ask:
#   launch/stage_data.sh data/nabirds.tar
#   launch/stage_data.sh data/nabirds
set -euo pipefail
archive=$1
disk=${SLURM_TMPDIR:-${TMPDIR:-/tmp}/vit-nabirds-$UID}
name=$(basename "$archive" .tar)
index=$archive/packed/index.parquet # the last file of a pack to be written
what=$archive how="unpacked in"
[ ! -f "$index" ] || { what=$index how="copied to"; }
this=$(stat --dereference --format='%n, %s bytes of %y' "$(realpath "$what")")
mkdir -p "$disk"
exec 9> "$disk/.$name.lock"
flock 9
if [ ! -e "$disk/.$name.staged" ]; then
    if [ "$what" = "$index" ]; then
        mkdir -p "$disk/$name/packed"
        cp "$archive/metadata.parquet" "$disk/$name"
        cp "$archive/packed/train.npy" "$archive/packed/test.npy" "$index" "$disk/$name/packed"
    else
        tar -xf "$archive" -C "$disk"
        [ -d "$disk/$name" ] || { echo "error: $archive holds no folder $name: tar -cf $name.tar -C FOLDER_ABOVE $name" >&2; exit 1; }
    fi
    echo "$this" > "$disk/.$name.staged"
    echo "$(hostname): $archive is $how $disk/$name"
elif [ "$(cat "$disk/.$name.staged")" != "$this" ]; then
    echo "error: $(hostname): $disk/$name is of another archive ($(cat "$disk/.$name.staged")): delete $disk/$name and $disk/.$name.staged" >&2
    exit 1
fi
