"""Fine-tuning: the jitted data-parallel step, and the loop from the first step to the last."""

import collections
import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from vit_nabirds import config as config_lib
from vit_nabirds.data import batches as data
from vit_nabirds.data.prepare import prepare
from vit_nabirds.data.synthetic import draw_archive
from vit_nabirds.errors import UserError
from vit_nabirds.evaluation.scoring import evaluate, make_eval_step, write_results
from vit_nabirds.models import vit as model
from vit_nabirds.models.normalization import Normalization, zscore
from vit_nabirds.models.pretrained import checkpoint as weights
from vit_nabirds.parallel import devices, link, preemption, processes
from vit_nabirds.recipe import optimizer
from vit_nabirds.recipe.augmentation import augment
from vit_nabirds.runs import checkpoints as checkpoint
from vit_nabirds.runs import compilation
from vit_nabirds.runs.selection import Selection
from vit_nabirds.runs.tracker import Monitor, Throughput
from vit_nabirds.training import state as state_lib

log = logging.getLogger("vit_nabirds")

METRICS = ("train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm")
REAL_BIRDS = """
  real birds:      python main.py prepare --archive=NABIRDS_FOLDER --out=data/nabirds
                   python main.py --config=configs/nabirds_vit_b16.py --workdir=runs/nabirds_vit_b16"""
FINISHED = 0
REMEDY = (
    "lower config.optimizer.learning_rate, lengthen config.optimizer.warmup or set config.optimizer.clip_norm=1, and "
    "start in a new --workdir."
)


def step_keys(seed: int, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of a step for augmentation and for dropout."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return augment_key, dropout_key


def checksum(rows: jax.Array) -> jax.Array:
    """uint32 that tells batches of other records, or of the same ones in another order, apart."""
    odd = 2 * jnp.arange(len(rows), dtype=jnp.uint32) + 1
    return jnp.sum(odd * (rows.astype(jnp.uint32) + 1))


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    groups: dict[str, list[str]],
    trainable: list[str],
    normalization: Normalization,
    crop: int,
    seed: int,
) -> Callable:
    """Jitted (state, batch) -> (state, metrics); the state is donated, and metrics are means over the batch.

    The state's `params` are packed as `groups` says, and `trainable` are names of theirs.
    """

    def train_step(state: dict, batch: dict) -> tuple[dict, dict]:
        augment_key, dropout_key = step_keys(seed, state["step"])
        images = zscore(augment(batch["image"], augment_key, crop), normalization)

        def loss_fn(params: dict) -> tuple[jax.Array, jax.Array]:
            params = state_lib.unpack(state["params"] | params, groups)
            logits = model.apply(graphdef, params, images, nnx.Rngs(dropout=dropout_key))
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), logits

        params = {path: state["params"][path] for path in trainable}
        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, state["opt_state"], params)
        metrics = {
            "train/loss": loss,
            "train/accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"]),
            "train/learning_rate": schedule(state["step"]),
            "train/gradient_norm": optax.tree.norm(gradients),
            "records": checksum(batch["row"]),
        }
        params = state["params"] | optax.apply_updates(params, updates)
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return model.jit(train_step, donate_argnums=0)


def train(config: ml_collections.ConfigDict, workdir: Path) -> int:
    """Train or resume the run in `workdir`; returns the exit code: 0 finished, 75 stopped with everything saved."""
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(preemption.StopRequest())

        # Configuration and devices
        config_lib.check(config)
        devices.split_cpu(config.cpu_devices)
        mesh = devices.make_mesh()
        if config.batch_size % mesh.size:
            raise UserError(
                f"config.batch_size is {config.batch_size}, which {mesh.size} devices cannot share equally: choose a "
                f"multiple of {mesh.size}."
            )

        # Data
        root = Path(config.data.root)
        if config.data.synthetic:
            with processes.writer_first("drawing"):
                prepare_synthetic(root, config.model.image_size)
        table = data.read_table(root)
        species, fingerprint = data.species_names(table), data.fingerprint(root, table)
        train_split, test_split = (data.open_split(root, table, train=split) for split in (True, False))
        for split in (train_split, test_split):
            data.check_labels(split, len(species))
        steps_per_epoch = Fraction(len(train_split), config.batch_size)
        total_steps = math.ceil(Fraction(str(config.epochs)) * steps_per_epoch)
        if (profiled := config_lib.profiled_steps(config)).start > total_steps:
            raise UserError(
                f"config.profile is {config.profile!r}, but the run has {total_steps} steps: name some of them."
            )

        # Model and optimizer
        saved_steps, about = checkpoint.newest(workdir / "checkpoints") or ([], None)
        start = max(saved_steps, default=0)
        resumed = about is not None
        check_workdir(workdir, resumed)
        if resumed:
            architecture, normalization, pretrained = about.architecture, about.normalization, None
        else:
            with processes.writer_first("pretrained weights"):
                architecture, normalization, pretrained = weights.starting_point(config)
        config = config_lib.resolve(config, architecture)
        if resumed:
            check_same_run(about, config, species, fingerprint, workdir)
        about = checkpoint.About(config.to_dict(), architecture, species, normalization, fingerprint)
        image_size = architecture["img_size"]
        data.check_sizes(train_split, test_split, image_size)
        graphdef, shapes = model.describe(
            architecture, len(species), config.compute_dtype, config.model.dropout_rate, config.remat
        )
        trainable = optimizer.trainable_paths(list(shapes), config.trainable)
        trained = state_lib.group(trainable, shapes)
        groups = trained | state_lib.group([path for path in shapes if path not in trainable], shapes)
        schedule = optimizer.make_schedule(config, total_steps, steps_per_epoch)
        tx = optimizer.make_optimizer(config, schedule)

        selection = Selection.read(workdir, saved_steps)
        selection.forget_after(start)
        evaluations = selection.evaluations
        processes.check_agreement(
            "what the run starts from",
            {"data": fingerprint, "step": start, "evaluated": list(evaluations), "devices": jax.local_device_count()},
            f"All nodes must see the same data and the same {workdir}, and have equally many devices.",
        )

        def initial_state(loaded: dict) -> dict:
            params = model.initial_params(architecture, len(species), config.seed) | loaded
            return state_lib.initial(params, tx, groups, trained)

        loaded = {}
        if pretrained:
            loaded = pretrained.load(architecture, species, lambda array: devices.replicate(array, mesh))
            del pretrained  # and with it the mapped files

        # State: all is known to be right, and from here on the run writes
        workdir.mkdir(parents=True, exist_ok=True)
        if processes.is_writer():
            stack.enter_context(
                locks.lock(
                    workdir / "lock",
                    f"another process trains in {workdir} right now: wait for its end, or use another --workdir.",
                )
            )
            checkpoint.write_json(workdir / "config.json", about.config)
            selection.write()
        processes.check_shared(workdir / "config.json")
        checkpoints = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(workdir / "checkpoints")))
        compilation.keep_compiled(workdir / "compiled", processes.is_writer())
        if resumed:
            like = jax.eval_shape(lambda params: state_lib.initial(params, tx, groups, trained), shapes)
            like["params"] = shapes
            state = checkpoints.restore(start, checkpoint.placed(like, devices.replicated(mesh)))
            state["params"] = jax.jit(lambda params: state_lib.pack(params, groups))(state["params"])
        else:
            state = jax.jit(initial_state, out_shardings=devices.replicated(mesh))(loaded)
        del loaded
        monitor = stack.enter_context(contextlib.closing(Monitor(workdir, start, total_steps, processes.is_writer())))
        monitor.text("config", f"```\n{json.dumps(about.config, indent=2)}\n```")
        checkpoints.best_step, checkpoints.unknown = selection.best(checkpoints.steps), selection.unknown
        log.info(
            "%s: %d species, %d train and %d test images; %s parameters, %s of them trained, in %s; steps %d to %d on "
            "%d %s device(s) of %d process(es)",
            workdir, len(species), len(train_split), len(test_split), f"{optimizer.count(shapes):,}",
            f"{optimizer.count({path: shapes[path] for path in trainable}):,}", config.compute_dtype, start,
            total_steps, mesh.size, jax.default_backend(), jax.process_count(),
        )  # fmt: skip

        # The loop
        stack.push(link.end_if_several)
        train_step = make_train_step(
            graphdef, tx, schedule, groups, list(trained), normalization, image_size, config.seed
        )
        eval_step = make_eval_step(graphdef, normalization)
        evaluate_every = config_lib.Duration.parse(config, "evaluate.every").in_steps(steps_per_epoch)
        save_period = config_lib.Duration.parse(config, "checkpoint.every")
        save_every = save_period.in_steps(steps_per_epoch)
        shard = grain.sharding.ShardByJaxProcess(drop_remainder=True)
        host_batches = data.train_batches(
            train_split, config.batch_size, config.seed, start, config.data.workers, shard
        )
        stack.callback(host_batches.close)
        throughput = Throughput(config.batch_size)
        unreported = collections.deque()
        parameter_norm = jax.jit(optax.tree.norm)
        by_path = jax.jit(lambda params: state_lib.unpack(params, groups))
        tracing = stack.enter_context(contextlib.ExitStack())
        traced = range(max(profiled.start, start + 1), profiled.stop) if processes.is_writer() else range(0)
        if config.profile:
            what = f"goes to {workdir / 'tensorboard'}" if traced else "is not made: they are done already"
            log.info("a trace of steps %s %s", config.profile, what)

        def next_batch() -> dict[str, jax.Array]:
            with throughput.waiting():
                batch = next(host_batches)
            if step == start and processes.is_writer():
                shown = jax.jit(augment, static_argnums=2)(
                    jnp.asarray(batch["image"][:16]), step_keys(config.seed, step)[0], image_size
                )
                captions = table[batch["row"][:16].tolist()].select("species_name", "photographer").rows()
                monitor.images("train/augmented", step, np.asarray(shown), captions)
            return devices.to_devices(batch, mesh)

        def report(keep: int) -> None:
            """Report the steps that are not yet, but the `keep` newest; it waits for those to be done."""
            while len(unreported) > keep:
                step, metrics = unreported.popleft()
                if not math.isfinite(loss := float(metrics["train/loss"])):
                    raise UserError(f"the loss of step {step} is {loss}: {REMEDY}")
                if step in (1, total_steps) or step % config.log_every == 0:
                    values = {name: float(metrics[name]) for name in METRICS} | throughput.read(step)
                    monitor.scalars(step, values, records=int(metrics["records"]))
                monitor.progress(step)

        def is_evaluated(step: int) -> bool:
            return step > 0 and (step == total_steps or config_lib.is_due(step, evaluate_every))

        def run_evaluation() -> bool:
            """Whether it came to its end before a request to stop."""
            workers, batch_size = config.data.workers, config.batch_size
            params = by_path(state["params"])
            metrics = evaluate(eval_step, params, test_split, len(species), batch_size, workers, mesh, stop)
            if metrics:
                monitor.scalars(step, metrics)
                evaluations[step] = metrics
                if processes.is_writer():
                    selection.write()
                checkpoints.best_step = selection.best([*checkpoints.steps, step])
            throughput.restart(step)
            return metrics is not None

        def save() -> float:
            report(keep=0)
            if not math.isfinite(parameter_norm(state["params"])):
                raise UserError(f"the parameters after step {step} are not finite: {REMEDY}")
            checkpoints.save(step, state | {"params": by_path(state["params"])}, about)
            return time.monotonic()

        def requests() -> np.ndarray | jax.Array:
            """Whether any process is asked to stop, and whether the clock of the writer asks to save: a promise."""
            by_clock = save_period.minutes is not None and processes.is_writer()
            return devices.any_process(
                mesh, stop.requested, by_clock and time.monotonic() - saved_at >= 60 * save_period.minutes
            )

        step, saved, saved_at, stopping = start, start if resumed else None, time.monotonic(), False
        if is_evaluated(start) and start not in evaluations:  # it was stopped between its checkpoint and its evaluation
            stopping = not run_evaluation()
        if step < total_steps and not stopping:
            batch = next_batch()
            train_step = train_step.lower(state, batch).compile()
            throughput.restart(step)
            stopping = np.asarray(requests())[0]
        while step < total_steps and not stopping:
            asked = requests()
            if traced and step + 1 == traced.start:
                tracing.enter_context(jax.profiler.trace(workdir / "tensorboard"))
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, metrics = train_step(state, batch)
            step += 1
            unreported.append((step, metrics))
            if step < total_steps:
                batch = next_batch()  # while the devices are at work on this step
            report(keep=1)  # one step late, so that the devices always have the next one
            if step + 1 == traced.stop:
                jax.block_until_ready(state)
                tracing.close()
            stopping, saving = np.asarray(asked)
            if is_evaluated(step) or config_lib.is_due(step, save_every) or saving:
                saved, saved_at = step, save()
                if is_evaluated(step) and not stopping:
                    stopping = not run_evaluation()
        report(keep=0)
        if saved != step:
            save()

    if step not in evaluations or step < total_steps:
        when = f" {time.monotonic() - stop.since:.1f} s after the signal" if stop.requested else ""
        log.info("stopped at step %d of %d, all saved%s: run the same command again to go on", step, total_steps, when)
        return preemption.EXIT_STOPPED
    if processes.is_writer():
        write_results(workdir / "results.json", evaluations, checkpoints.best_step, step)
    log.info(
        "finished: best checkpoint: step %d, accuracy %.4f on %d test images\n"
        "  see the curves:  tensorboard --logdir=%s\n"
        "  score the best:  python main.py evaluate --workdir=%s\n"
        "  name birds:      python main.py predict --workdir=%s --images=FOLDER --out=birds.csv%s",
        checkpoints.best_step, evaluations[checkpoints.best_step]["test/accuracy"], evaluations[step]["test/examples"],
        workdir, workdir, workdir, REAL_BIRDS if config.data.synthetic else "",
    )  # fmt: skip
    return FINISHED


def prepare_synthetic(root: Path, image_size: int) -> None:
    """Draw an archive of invented photographs and prepare it as `root`, unless that has been done."""
    if not (root / "metadata.parquet").exists():
        log.info("drawing photographs of birds into %s", root)
        draw_archive(root / "archive", species=8, train=80, test=30)
        prepare(root / "archive", root, train_size=round(1.2 * image_size), test_size=image_size)


def check_workdir(workdir: Path, resumed: bool) -> None:
    """Raise UserError when a run cannot start or go on there."""
    for folder in (workdir, workdir / "checkpoints"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, where a run needs a folder: use another --workdir.")
    if (workdir / "results.json").exists() and not resumed:
        raise UserError(f"{workdir} holds the results of a run whose checkpoints are gone: use another --workdir.")


def check_same_run(
    about: checkpoint.About, config: ml_collections.ConfigDict, species: list[str], fingerprint: str, workdir: Path
) -> None:
    """Raise UserError when the run in `workdir` was another one: going on would mix the two."""
    if about.species != species:
        raise UserError(
            f"{workdir} holds a checkpoint of {len(about.species)} classes, but {config.data.root} has {len(species)} "
            "species, or others: use another --workdir, or the data of that run."
        )
    if about.fingerprint != fingerprint:
        raise UserError(
            f"{workdir} holds a run on other records or images than {config.data.root} has (its metadata.parquet or "
            "prepared.json differs): use another --workdir, or the data of that run."
        )
    if changed := config_lib.differences(about.config, config.to_dict()):
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}): use another --workdir, or take "
            "the change back to resume it."
        )
