#!/bin/bash
# Copies a prepared folder, packed or in a .tar file, to the local disk of this node: once, however many tasks ask.
#   launch/stage_data.sh data/nabirds.tar
#   launch/stage_data.sh data/nabirds
set -euo pipefail
archive=$1
disk=${SLURM_TMPDIR:-${TMPDIR:-/tmp}/vit-nabirds-$UID}
name=$(basename "$archive" .tar)
about=("$archive"/{metadata.parquet,prepared.json,packed/index.parquet}) # small; the index is written last
if [ -f "${about[2]}" ]; then
    files=("${about[@]}") how="copied to"
elif [ -f "$archive" ]; then
    files=("$archive") how="unpacked in"
else
    echo "error: $archive is neither a .tar file nor a packed folder (main.py prepare --pack)" >&2
    exit 1
fi
mapfile -t files < <(realpath "${files[@]}")
this=$(stat --dereference --format='%n, %s bytes of %y' "${files[@]}")
mkdir -p -m 700 "$disk"
[ -O "$disk" ] && [ ! -L "$disk" ] || { echo "error: $(hostname): $disk belongs to somebody else: set TMPDIR to a folder of your own" >&2; exit 1; }
exec 9>> "$disk/.$name.lock"
flock 9
if [ ! -e "$disk/.$name.staged" ]; then
    if [ "$how" = "copied to" ]; then
        mkdir -p "$disk/$name/packed"
        cp "${about[@]:0:2}" "$disk/$name" || exit 74 # the disk of another node may have room
        cp "$archive"/packed/{train.npy,test.npy,index.parquet} "$disk/$name/packed" || exit 74
    else
        tar -xf "$archive" -C "$disk" || exit 74
        [ -d "$disk/$name" ] || { echo "error: $archive does not hold a folder $name: make it with tar -cf $name.tar -C PARENT_FOLDER $name" >&2; exit 1; }
    fi
    echo "$this" > "$disk/.$name.staged"
    echo "$(hostname): $archive is $how $disk/$name"
elif [ "$(cat "$disk/.$name.staged")" != "$this" ]; then
    echo "error: $(hostname): $disk/$name was made from another archive ($(cat "$disk/.$name.staged")): delete $disk/$name and $disk/.$name.staged" >&2
    exit 1
fi
