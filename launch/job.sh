# What every job does; the *.sbatch files source it, and differ in what they ask Slurm for. In the checkout:
#   launch/train.sbatch [--dry-run] [--OPTION=VALUE of sbatch ...] -- --workdir=DIR [OPTION of training ...]
# submits (or shows what would be submitted); `sbatch [OPTION ...] launch/train.sbatch --workdir=DIR ...` does too.
# Of the environment:
#   VENV            the virtual environment, .venv by default
#   STAGE           a .tar of a prepared folder: unpacked on each node's own disk first, it becomes config.data.root
#   MAX_FRUITLESS   how often in a row the job is queued again without a newer checkpoint, 3 by default
set -uo pipefail
die() { echo "error: $1" >&2; exit 2; }
quoted() { printf ' %q' "$@"; echo; }

submitting=no dry_run=no
requested=("${resources[@]}")
if [ -z "${SLURM_JOB_ID:-}" ]; then
    submitting=yes
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        case $1 in
            --dry-run) dry_run=yes ;;
            --*) requested+=("$1") ;;
            *) die "'$1': write sbatch's options like --nodes=2, then --, then those of the training." ;;
        esac
        shift
    done
    [ $# -gt 0 ] || die "usage: $job [--dry-run] [--OPTION=VALUE of sbatch ...] -- --workdir=DIR [OPTION of training ...]"
    shift
fi

workdir=
for argument in "$@"; do
    case $argument in --workdir=?*) workdir=${argument#*=} ;; esac
done
[ -n "$workdir" ] || die "give the training a --workdir=DIR, on storage that all nodes share."
[ ${#variant[@]} -eq 0 ] || workdir=$workdir/${variant[0]#--config.optimizer.}
training=(python main.py train "$@" "${variant[@]}" "--workdir=$workdir")
if [ -n "${STAGE:-}" ]; then
    training+=("--config.data.root=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/$(basename "$STAGE" .tar)")
    [ -f "$STAGE" ] || die "STAGE=$STAGE is not a file: make it with tar -cf $STAGE -C FOLDER_ABOVE PREPARED_FOLDER."
fi
# A failing process ends the others itself, with its own message; srun does when that takes over half a minute.
step=(srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=30)

if [ $submitting = yes ]; then
    if [ $dry_run = yes ]; then
        echo "command:"; quoted sbatch "${requested[@]}" "$job" "$@"
        echo "asks Slurm for:"
        declare -A asked
        while read -r option; do asked[${option%%=*}]=$option; done < <(
            sed -n 's/^#SBATCH //p' "$job"
            env | sed -n 's/^SBATCH_\([A-Z_]*\)=/\1 /p' | while read -r name value; do
                name=${name,,}; echo "--${name//_/-}=$value"
            done
            printf '%s\n' "${requested[@]}"
        )
        printf '  %s\n' "${asked[@]}" | sort
        [ -z "${STAGE:-}" ] || { echo "on each node first:"; quoted launch/stage_data.sh "$STAGE"; }
        echo "each task:"; quoted "${training[@]}"
        exit 0
    fi
    exec sbatch "${requested[@]}" "$job" "$@"
fi

source "${VENV:-.venv}/bin/activate" || die "there is no virtual environment ${VENV:-.venv}: see BUILD.md, or set VENV."
mkdir -p "$workdir" || exit 1
if [ -n "${STAGE:-}" ]; then
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 launch/stage_data.sh "$STAGE" || exit 1
fi

trap : TERM # preemption signals this shell too, which has yet to ask for its return to the queue
"${step[@]}" "${training[@]}"
code=$?

# 75: stopped on request, all saved. 128 and above: a process was killed. Anything else has come to its end.
if [ $code -ne 75 ] && [ $code -lt 128 ]; then exit $code; fi
newest=$(ls "$workdir/checkpoints" 2> /dev/null | grep -x '[0-9]*' | sort -n | tail -n 1)
mark="job=$SLURM_JOB_ID step=${newest:-none}"
echo "$mark exit=$code $(date +%FT%T)" >> "$workdir/restarts.log"
limit=${MAX_FRUITLESS:-3}
if [ "$(tail -n $((limit + 1)) "$workdir/restarts.log" | grep -c "^$mark ")" -gt "$limit" ]; then
    echo "error: ended $((limit + 1)) times in a row at step ${newest:-none} (exit code $code): not queued again." >&2
    exit $code
fi
# A job that ends by itself inside the grace time of its preemption is not queued again by Slurm; one that was
# cancelled, or that Slurm has queued again, is not running any more.
if [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    echo "asking Slurm for another turn, to go on from step ${newest:-0}"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
