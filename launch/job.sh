# The body of every job. The *.sbatch files source it; they differ only in the resources they request. In the checkout,
#   launch/train.sbatch [--dry-run] [--check] [--OPTION=VALUE ...] -- --workdir=DIR [TRAINING OPTION ...]
# submits a job, with --check only if `main.py check` finds nothing to fix (--check=h100 names the GPUs where no option
# does), or with --dry-run shows what it would submit. Options before `--` go to sbatch, those after it to the trainer.
# `sbatch [--OPTION=VALUE ...] launch/train.sbatch --workdir=DIR ...` works too. With --array=0-N and, after `--`,
# `sweep --set FIELD=VALUE,VALUE ...`, each task of the array trains one run of the sweep, in a workdir of its own below
# DIR. Environment variables:
#   VENV            virtual environment (default: .venv)
#   STAGE           prepared folder, packed or in a .tar file: copied to each node's local disk before the training and
#                   used as config.data.root
#   MAX_FRUITLESS   how many requeues in a row may pass without a new checkpoint (default: 3)
#   SRUN_OPTIONS    more options of srun, like --gpu-bind=closest
set -uo pipefail
die() { echo "error: $1" >&2; exit 2; }
quoted() { printf ' %q' "$@"; echo; }
activated() {
    local environment=${VENV:-.venv}/bin/activate
    [ -f "$environment" ] || die "there is no virtual environment ${VENV:-.venv}: see BUILD.md, or set VENV."
    source "$environment"
}
# Options that replace one of the scripts' own, which Slurm would refuse beside them.
declare -A instead=(
    [mem]=mem-per-cpu [mem-per-gpu]=mem-per-cpu [ntasks]=ntasks-per-node [ntasks-per-gpu]=ntasks-per-node
    [ntasks-per-socket]=ntasks-per-node [ntasks-per-core]=ntasks-per-node [cpus-per-gpu]=cpus-per-task
    [tres-per-task]=cpus-per-task [share]=exclusive [oversubscribe]=exclusive
)

submitting=no dry_run=no checking=no described=()
requested=()
if [ -z "${SLURM_JOB_ID:-}" ] || [[ " $* " == *" -- "* ]]; then # also inside an allocation, when called by hand
    submitting=yes
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        case $1 in
            --dry-run) dry_run=yes ;;
            --check) checking=yes ;;
            --check=?*) checking=yes described=("--gpus=${1#*=}") ;;
            --*) requested+=("$1") ;;
            *) die "'$1': write sbatch's options like --nodes=2, then --, then those of the trainer." ;;
        esac
        shift
    done
    [ $# -gt 0 ] || die "usage: $job [--dry-run] [--check] [--OPTION=VALUE of sbatch ...] -- --workdir=DIR [TRAINING OPTION ...]"
    shift
fi

training=(python main.py train "$@") workdir=
if [ "${1:-}" = sweep ]; then
    training=(python main.py "$@")
    [ $checking = no ] || die "--check is for one training: \`python main.py sweep ... --dry_run\` checks the configurations of a sweep."
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || [[ " ${requested[*]} " == *" --array="* ]] ||
        die "a sweep is an array of jobs: give sbatch --array=0-N (\`python main.py sweep ... --dry_run\` says N)."
fi
for argument in "$@"; do
    case $argument in --workdir=?*) workdir=${argument#*=} ;; esac
done
[ -n "$workdir" ] || die "give the trainer a --workdir=DIR on storage that all nodes share."
[[ $workdir != *://* ]] || die "--workdir=$workdir: give a folder on storage that all nodes share."
limit=${MAX_FRUITLESS:-3}
[[ $limit =~ ^[0-9]+$ ]] || die "MAX_FRUITLESS is '$limit': give a number."
if [ -n "${STAGE:-}" ]; then
    [[ -f $STAGE && $STAGE == *.tar || -f $STAGE/packed/index.parquet ]] ||
        die "STAGE=$STAGE is neither a .tar file (tar -cf birds.tar -C PARENT_FOLDER birds makes one) nor a packed folder (main.py prepare --pack)."
    training+=("--config.data.root=${SLURM_TMPDIR:-${TMPDIR:-/tmp}/vit-nabirds-$UID}/$(basename "$STAGE" .tar)")
fi
# A process that fails ends the others itself, with one message; srun ends them if that takes more than 30 s.
step=(srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=30)
read -ra more <<< "${SRUN_OPTIONS:-}"
step+=("${more[@]}")

if [ $submitting = yes ]; then
    # Of an allocation that this is typed in, the job would take more than sbatch replaces.
    for name in $(compgen -e SLURM_); do [[ $name == SLURM_CONF* ]] || unset "$name"; done
    environment=$(env | sed -n 's/^SBATCH_\([A-Z_]*\)=/\1 /p' | while read -r name value; do
        name=${name,,}; name=${name/#timelimit/time}; echo "--${name//_/-}=$value"
    done)
    replaced=()
    for option in "${requested[@]}" $environment; do
        name=${option#--}; name=${instead[${name%%=*}]:-}
        [ -z "$name" ] || replaced+=(-e "/^#SBATCH --$name\\b/d")
    done
    script=$(mktemp)
    trap 'rm -f "$script"' EXIT
    sed -e '' "${replaced[@]}" "$job" > "$script"
    declare -A asked
    while read -r option; do asked[${option%%=*}]=$option; done < <(
        sed -n 's/^#SBATCH //p' "$script"
        [ -z "$environment" ] || echo "$environment"
        [ ${#requested[@]} -eq 0 ] || printf '%s\n' "${requested[@]}"
    )
    if [ $checking = yes ]; then
        checked=()
        for argument in "${training[@]:3}"; do [[ $argument == --start_timeout=* ]] || checked+=("$argument"); done
        if [ -n "${STAGE:-}" ]; then
            [ -d "${STAGE%.tar}" ] || die "--check reads the photographs: keep the folder ${STAGE%.tar} beside $STAGE, or leave out --check."
            checked+=("--config.data.root=${STAGE%.tar}")
        fi
        (activated && python main.py check "${checked[@]}" "${asked[@]/#/--sbatch=}" "${described[@]}") || exit
    fi
    if [ $dry_run = yes ]; then
        echo "command:"; quoted sbatch "${requested[@]}" "$job" "$@"
        diff "$job" "$script" | sed -n 's/^< #SBATCH/replaced:/p'
        echo "asks Slurm for:"
        printf '  %s\n' "${asked[@]}" | sort
        [ -z "${STAGE:-}" ] || { echo "on each node first:"; quoted launch/stage_data.sh "$STAGE"; }
        echo "each task:"; quoted "${training[@]}"
        if sinfo > /dev/null 2>&1; then sbatch --test-only "${requested[@]}" "$script" "$@" || exit 2; fi
        exit 0
    fi
    sbatch "${requested[@]}" "$script" "$@"
    exit
fi

activated
export VIT_NABIRDS_TOKEN=${VIT_NABIRDS_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')} # keeps strangers out
export SLURM_EXIT_ERROR=74 # of srun: a node or the controller does not answer
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1} # memory in pages of 2 MB: BUILD.md
preempted=no
trap 'preempted=yes' TERM USR1 USR2 # preemption signals this shell too, but it must live on to requeue the job
code=0
if [ "$1" = sweep ]; then # one of its runs, after a check of all
    own=$(SLURM_NTASKS=1 "${training[@]}" --dry_run) && workdir=$own || code=$?
    [ $preempted = no ] || code=75
fi
if ! problem=$(LC_ALL=C mkdir -p "$workdir" 2>&1); then
    echo "error: $problem" >&2
    case $problem in *": Permission denied" | *": Not a directory" | *": File exists") exit 1 ;; esac
    code=74
fi
if [ $code -eq 0 ] && [ -n "${STAGE:-}" ]; then
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 launch/stage_data.sh "$STAGE" || code=$?
    [ $preempted = no ] || code=75
fi
if [ $code -eq 0 ]; then
    "${step[@]}" "${training[@]}"
    code=$?
fi

# 75: stopped on request, everything saved. 74: trouble of a node or of storage. 128 and above: a process was killed.
# Any other code is final.
if [ $code -ne 75 ] && [ $code -ne 74 ] && [ $code -lt 128 ]; then exit $code; fi
this=$SLURM_JOB_ID # for the last task of an array it names the whole array
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || this=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
newest=$(ls "$workdir/checkpoints" 2> /dev/null | grep -x '[0-9]*' | sort -n | tail -n 1)
mark="job=$this step=${newest:-none}"
if echo "$mark exit=$code $(date +%FT%T)" >> "$workdir/restarts.log"; then
    fruitless=$(tail -n $((limit + 1)) "$workdir/restarts.log" | grep -c "^$mark ")
else # full or read-only: of the starts that Slurm counts, those that could not be written down
    written=$(grep -c "^job=$this " "$workdir/restarts.log" 2> /dev/null)
    fruitless=$((${SLURM_RESTART_COUNT:-0} + 1 - ${written:-0}))
fi
if [ "$fruitless" -gt "$limit" ]; then
    echo "error: ended $((limit + 1)) times in a row at step ${newest:-none} (exit code $code): not requeued." >&2
    exit $code
fi
# Slurm does not requeue a preempted job that exits by itself within the grace time.
for pause in 5 20 60; do # the controller may be busy
    if state=$(scontrol show job --oneliner "$this"); then
        # cancelled, already requeued by Slurm, or submitted with --no-requeue
        [[ $state == *" JobState=RUNNING "* && $state == *" Requeue=1 "* ]] || exit $code
        echo "requeueing the job to resume from step ${newest:-0}"
        scontrol requeue "$this" && exit $code
    fi
    sleep $pause
done
echo "error: Slurm did not requeue the job: submit the same command again." >&2
exit $code
