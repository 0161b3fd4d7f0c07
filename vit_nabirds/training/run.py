"""A run before it starts: everything that can be wrong is checked, and nothing is written into its workdir."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import jax
import numpy as np
import optax
import polars as pl

from vit_nabirds.config import Config
from vit_nabirds.config.fields import CHANGEABLE, SHAPE, differences, flat
from vit_nabirds.config.plan import Plan
from vit_nabirds.data.batches import (
    Waiting,
    batch_bytes,
    check_repeats,
    check_workers,
    train_batches,
    unwatched,
    worker_count,
)
from vit_nabirds.data.photographs import Photographs, check_labels, check_sizes, open_split
from vit_nabirds.data.table import class_differences, class_names, fingerprint, read_table, settings_of
from vit_nabirds.data.taxonomy import Taxonomy, read_taxonomy
from vit_nabirds.data.unread import Unread
from vit_nabirds.errors import ConfigError, UserError, quoted
from vit_nabirds.models.model import Model, describe
from vit_nabirds.models.pretrained.checkpoint import Checkpoint
from vit_nabirds.parallel import devices, sharding
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.recipe.loss import make_loss
from vit_nabirds.recipe.optimizer import make_optimizer, make_schedule
from vit_nabirds.recipe.rules import Rule, parameter_rules, trained_paths
from vit_nabirds.runs.checkpoints import Checkpoints, Metadata, base_checksum, existing, placed, sha256_of
from vit_nabirds.runs.loading import base_params
from vit_nabirds.runs.selection import Selection, metric_of
from vit_nabirds.runs.start import starting_point
from vit_nabirds.training.microbatch import Memory, largest_that_fits, memory_of
from vit_nabirds.training.products import flops_of_products
from vit_nabirds.training.state import TrainState
from vit_nabirds.training.step import is_mixed, make_train_step

log = logging.getLogger("vit_nabirds")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to start: from its first state, or from a checkpoint in its workdir."""

    config: Config  # with the model's shape filled in
    plan: Plan
    workdir: Path
    mesh: jax.sharding.Mesh
    table: pl.DataFrame
    train_split: Photographs
    validation_split: Photographs | None
    test_split: Photographs
    taxonomy: Taxonomy | None
    model: Model
    metadata: Metadata
    pretrained: Checkpoint | None  # weights to start from
    rules: dict[str, Rule]  # of the parameters, by path
    trainable: list[str]  # paths of the parameters that are
    tx: optax.GradientTransformation
    make_step: Callable[[int], Callable]  # microbatch -> jitted step
    saved_steps: list[int]  # of the checkpoints in the workdir
    selection: Selection

    @property
    def start(self) -> int:
        """The step to go on from: 0, or that of the newest checkpoint."""
        return max(self.saved_steps, default=0)

    @property
    def saved(self) -> list[str]:
        """Paths of the parameters in checkpoints: all, or those beside the base of LoRA."""
        return self.model.stored_paths

    @property
    def has_converged(self) -> bool:
        """Whether so many evaluations in a row were no better than an earlier one that the training may end."""
        return 0 < self.config.evaluate.patience <= self.selection.evaluations_since_best

    @property
    def goes_on(self) -> bool:
        """Whether there are steps left to train, from the run's start."""
        return self.start < self.plan.total_steps and not self.has_converged

    @property
    def splits(self) -> dict[str, Photographs]:
        """Those that there are, by name."""
        splits = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return {name: split for name, split in splits.items() if split}

    @property
    def data_in_words(self) -> str:
        """Like '404 species, 21,536 train, 2,393 validation and 24,633 test photographs'."""
        *most, last = [f"{len(split):,} {name}" for name, split in self.splits.items()]
        what = "species" if self.config.data.label == "species" else "categories"
        return f"{self.model.num_classes:,} {what}, {', '.join(most)} and {last} photographs"

    @property
    def facts(self) -> dict:
        """What run.json says of data and model: fields of `Record`."""
        shapes = self.model.shapes
        parameters, trained = (sum(math.prod(shapes[path].shape) for path in x) for x in (shapes, self.trainable))
        return {
            "total_steps": self.plan.total_steps,
            "classes": self.model.num_classes,
            "photographs": {name: len(split) for name, split in self.splits.items()},
            "parameters": parameters,
            "trained": trained,
            "fingerprint": self.metadata.fingerprint,
        }

    def state_shapes(self) -> TrainState:
        """The state with a shape, a dtype and a sharding in place of each array."""
        return sharding.laid_out(jax.eval_shape(self._initial, self.model.shapes), self.mesh)

    def _initial(self, params: dict[str, jax.Array]) -> TrainState:
        return TrainState.initial(params, self.tx, self.trainable, averages=self.config.ema_decay > 0)

    def batch_shapes(self, batch_size: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """The same of a global batch, of the configuration's size or another."""
        batch, side = batch_size or self.config.batch_size, self.train_split.size
        image = jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8)
        number = jax.ShapeDtypeStruct((batch,), np.int32)
        return placed({"image": image, "label": number, "row": number}, devices.over_batch(self.mesh))

    def trace_step(self, batch_size: int | None = None, microbatch: int | None = None) -> jax.stages.Traced:
        """The training step as JAX sees it: (state, batch) -> (state, metrics)."""
        microbatch = max(0, self.config.microbatch) if microbatch is None else microbatch
        return self.make_step(microbatch).trace(self.state_shapes(), self.batch_shapes(batch_size))

    @functools.cached_property
    def traced_step(self) -> jax.stages.Traced:
        return self.trace_step()

    @functools.cached_property
    def step_flops(self) -> int:
        """Floating-point operations of a step's matrix products on one device."""
        return flops_of_products(self.traced_step.jaxpr.jaxpr)

    def compile_step(self, traced: jax.stages.Traced | None = None, options: dict | None = None) -> jax.stages.Compiled:
        """The same, compiled, which takes seconds to minutes; with microbatch -1 for one size after another."""
        if traced or self.config.microbatch != -1:
            return self._compile(traced or self.traced_step, options)
        compiled = functools.cache(lambda microbatch: self._compile(self.trace_step(None, microbatch), options))
        share, available = self.config.batch_size // self.mesh.size, memory_of(devices.own(self.mesh))

        def fits(microbatch: int) -> bool:
            """On the devices of all processes."""
            return not np.asarray(devices.any_process(self.mesh, Memory.of(compiled(microbatch)).total > available))[0]

        found = largest_that_fits(share, fits, is_mixed(self.config))
        log.info("microbatch %d: of %d images a device works on so many at once", found or share, share)
        return compiled(found)

    def _compile(self, traced: jax.stages.Traced, options: dict | None) -> jax.stages.Compiled:
        log.info("compiling the training step for %d device(s)", self.mesh.size)
        started = time.monotonic()
        compiled = traced.lower().compile(compiler_options=options)
        log.info("compiled in %.1f s", time.monotonic() - started)
        return compiled

    def pretrained_params(self) -> dict[str, jax.Array]:
        """Those parameters by path that a run does not draw at random or find in its checkpoint; UserError if they are
        not finite, or not those that a LoRA run started from."""
        place = functools.partial(sharding.spread, mesh=self.mesh)
        if self.pretrained is not None:
            return self.pretrained.load(self.model.architecture, self.metadata.species, place)
        return jax.tree.map(place, base_params(self.metadata)) if self.config.lora.rank else {}

    def first_state(self, pretrained_params: dict[str, jax.Array]) -> TrainState:
        """The state of a new run before its first step."""
        new = [path for path in self.model.shapes if path not in pretrained_params]
        drawn = jax.device_get(self.model.initial_params(self.config.seed, new))
        params = pretrained_params | {path: sharding.spread(x, self.mesh) for path, x in drawn.items()}
        layout = sharding.layout(self.state_shapes(), self.mesh)
        return jax.jit(self._initial, out_shardings=layout)(params)

    def restore(self, checkpoints: Checkpoints, pretrained_params: dict[str, jax.Array]) -> TrainState:
        """The state of the newest checkpoint, on this run's devices; what checkpoints leave out is pretrained."""
        like = self.state_shapes()
        state = like.with_parts(checkpoints.restore(self.start, like.parts(self.saved)))
        return dataclasses.replace(state, params=pretrained_params | {path: state.params[path] for path in self.saved})

    def evaluated(self, checkpoints: Checkpoints, step: int) -> dict[str, jax.Array]:
        """The parameters of a checkpoint that are evaluated, by path."""
        like = self.state_shapes().parts(self.saved)
        parts = checkpoints.restore(step, {name: part for name, part in like.items() if name != "training"})
        base = self.pretrained_params() if self.config.lora.rank else {}
        return base | parts["params"] | parts.get("ema", {})

    def batches(self, waits_for: Waiting = unwatched) -> Iterator[dict[str, np.ndarray]]:
        """This host's block of each global batch from the run's first step on: dicts of NumPy arrays."""
        shard = grain.sharding.ShardByJaxProcess(drop_remainder=True)
        config, unread = self.config, Unread(self.train_split, self.config.data.tolerated)
        batches = train_batches(
            self.train_split, config.batch_size, config.seed, self.start, config.data.workers, shard,
            unread.are_tolerated, config.data.sampling, config.data.repeats, waits_for,
        )  # fmt: skip
        return unread.watch(batches)


def prepare_run(
    config: Config,
    workdir: Path,
    group: ProcessGroup,
    mesh: jax.sharding.Mesh | None = None,
    accept_changes: bool = False,
    from_step: int | None = None,
) -> Run:
    """Check everything and return the run, on all devices or on a given mesh, whose devices need not exist.

    With `accept_changes`, a run goes on with another recipe, and from the checkpoint of `from_step` unless later ones
    have that recipe already: the same command, started again, loses nothing.

    Writes nothing into the workdir; UserError for a mistake of the user's.
    """
    check_workers(config.data.workers)
    devices.split_cpu(config.cpu_devices)
    mesh = mesh or devices.make_mesh(config.mesh.fsdp)
    check_batch_size(config, mesh.size)

    root = Path(config.data.root)
    table = read_table(root, config.data.label, config.data.validation)
    train_split, test_split = (open_split(root, table, split) for split in ("train", "test"))
    validation_split = open_split(root, table, "validation") if config.data.validation else None
    plan = Plan.of(config, len(train_split))
    shard = grain.sharding.ShardByJaxProcess(drop_remainder=True)
    worker_count(config.data.workers, train_split.is_packed, batch_bytes(train_split, config.batch_size, shard))

    check_workdir(workdir)
    saved_steps, saved = existing(workdir / "checkpoints")
    if saved:
        architecture, normalization, pretrained = saved.architecture, saved.normalization, None
    else:
        architecture, normalization, pretrained = starting_point(config, group)
    config = _resolved(config, architecture, saved)
    classes, crop = class_names(table), settings_of(root).get("crop", "box")
    if from_step is not None and not saved:
        raise ConfigError(f"--from_step is {from_step}, but {workdir} has no checkpoints.")
    changed = {}
    base, digests = saved.base if saved else None, {}
    if pretrained:
        log.info(pretrained.account(architecture, classes))
        digests = pretrained.load(architecture, classes, sha256_of)
        base = base_checksum(digests)
    metadata = Metadata(config.to_dict(), architecture, classes, normalization, fingerprint(root, table), crop, base)
    if saved:
        saved_steps, metadata, changed = _going_on(saved_steps, saved, metadata, workdir, accept_changes, from_step)
    if len(classes) == 1:
        raise UserError(f"{root} has one class, {quoted(classes[0])}: prepare photographs of at least two.")
    for split in (train_split, test_split):
        check_labels(split, len(classes))
    check_sizes(architecture["image_size"], test_split, train_split)

    model = describe(
        architecture, len(classes), config.compute_dtype, config.model.dropout_rate, config.remat,
        device=devices.own(mesh), drop_path=config.model.drop_path, head_stddev=config.model.head_stddev,
        lora=config.lora,
    )  # fmt: skip
    rules = parameter_rules(config, model)
    if not saved and "classifier/kernel" not in digests and not config.model.head_stddev:
        check_new_head(rules)
    trainable, schedule = trained_paths(rules), make_schedule(config, plan)
    tx = make_optimizer(config, schedule, rules)
    loss_fn = make_loss(config.loss, np.bincount(train_split.labels, minlength=len(classes)))
    make_step = functools.partial(
        make_train_step, config, model, tx, schedule, trainable, loss_fn, normalization, mesh
    )  # fmt: skip
    selection = Selection.read(workdir, saved_steps, metric_of(config))
    selection.ask_again([step for step in saved_steps[:-1] if plan.evaluates(step)])
    run = Run(
        config, plan, workdir, mesh, table, train_split, validation_split, test_split, read_taxonomy(root, table),
        model, metadata, pretrained, rules, trainable, tx, make_step, saved_steps, selection,
    )  # fmt: skip
    if changed:
        check_state(run, changed)
    selection.forget_after(run.start)
    _check_agreement(run, group)
    return run


def _going_on(
    steps: list[int], saved: Metadata, metadata: Metadata, workdir: Path, accept_changes: bool, from_step: int | None
) -> tuple[list[int], Metadata, dict[str, str]]:
    """The checkpoints that a run goes on from, its metadata with their history, and what the configuration changes."""
    config = Config.read(metadata.config)
    if changed := _changes_of(saved, metadata, config, workdir, accept_changes):
        if from_step is not None:
            steps, saved = up_to(workdir, steps, from_step)
            changed = _changes_of(saved, metadata, config, workdir, accept_changes)
        log.info("changed from step %d on: %s", max(steps), changed)
    elif from_step is not None:
        log.info("--from_step is not used: the newest checkpoint has this configuration already")
    entry = [{"step": max(steps), "changed": changed}] if changed else []
    return steps, dataclasses.replace(metadata, history=[*saved.history, *entry]), changed


def up_to(workdir: Path, steps: list[int], last: int) -> tuple[list[int], Metadata]:
    """The steps up to `last`, and the metadata of that one; ConfigError if it has no checkpoint."""
    if last not in steps:
        raise ConfigError(f"--from_step is {last}, but {workdir} has checkpoints of {', '.join(map(str, steps))}.")
    with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:
        return [step for step in steps if step <= last], checkpoints.metadata(last)


def check_state(run: Run, changed: dict[str, str]) -> None:
    """UserError if the newest checkpoint has other arrays than the run as it was changed."""
    with contextlib.closing(Checkpoints(run.workdir / "checkpoints", read_only=True)) as checkpoints:
        fits = checkpoints.fits(run.start, run.state_shapes().parts(run.saved))
    if not fits:
        raise UserError(
            f"the change ({', '.join(changed)}) needs other parameters or another state of the optimizer than the "
            "checkpoint has: use another --workdir, which may start from this one (--config.model.pretrained)."
        )


def check_batch_size(config: Config, num_devices: int) -> None:
    """ConfigError if the devices cannot share a batch equally, or work on their shares as the configuration asks."""
    batch_size, microbatch, (share, rest) = config.batch_size, config.microbatch, divmod(config.batch_size, num_devices)
    if rest:
        raise ConfigError(
            f"config.batch_size is {batch_size}, which {num_devices} devices cannot share equally: choose a multiple "
            f"of {num_devices}."
        )
    if microbatch > 0 and share % microbatch:
        raise ConfigError(
            f"config.microbatch is {microbatch}, which does not divide the {share} images of a device "
            f"(config.batch_size / {num_devices}): choose a divisor of {share}."
        )
    if is_mixed(config) and (share % 2 or microbatch > 0 and microbatch % 2):
        raise ConfigError(
            f"config.augment mixes images in pairs, but a device works on {microbatch if microbatch > 0 else share} at "
            "once: choose config.batch_size and config.microbatch so that it is an even number."
        )
    check_repeats(batch_size, config.data.repeats)


def check_new_head(rules: dict[str, Rule]) -> None:
    """ConfigError if a classifier of zeros is frozen: no gradient passes it."""
    if rules["classifier/kernel"].frozen:
        raise ConfigError(
            "the classifier is new and starts from zero, but it is frozen, so nothing would be learned: train it "
            "(config.trainable, config.optimizer.rules), or start from weights whose classifier has these classes."
        )


def _resolved(config: Config, architecture: dict, saved: Metadata | None) -> Config:
    """With the model's shape filled in and an absolute data.root; ConfigError when a new run asks for another shape."""
    values = {f"model.{field}": architecture[field] for field in (*SHAPE, "pool")}
    given = {name: value for name, value in flat(config.to_dict()).items() if name in values and value is not None}
    wrong = [name for name, value in given.items() if value != values[name]]
    if wrong and not saved:  # a resumed run reports it among its differences
        raise ConfigError(
            f"config.{wrong[0]} is {given[wrong[0]]}, but {config.model.pretrained} has {values[wrong[0]]}: leave it "
            "out, or empty config.model.pretrained for random weights."
        )
    if saved and not config.lora.rank:  # the weights that the run started from; those of LoRA may have been moved
        given["model.pretrained"] = stored = saved.config["model"]["pretrained"]
        if _absolute(config.model.pretrained) != stored:
            log.info(
                "config.model.pretrained is not read: the run goes on from its checkpoint, and began with %r", stored
            )
    else:
        given["model.pretrained"] = _absolute(config.model.pretrained)
    return config.replace(values | given | {"data.root": str(Path(config.data.root).resolve())})


def _absolute(pretrained: str) -> str:
    """The path of a folder, or what else names weights."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if pretrained and folder.is_dir() else pretrained


def check_workdir(workdir: Path) -> None:
    """UserError if a file is where a run needs a folder, or the checkpoints of its results are gone."""
    checkpoints, results = workdir / "checkpoints", workdir / "results.json"
    for folder in (*reversed(workdir.absolute().parents), workdir, checkpoints):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, where a run needs a folder: use another --workdir.")
    if (workdir / "metadata.parquet").exists():
        raise UserError(f"{workdir} is a folder that `prepare` wrote: give it as --config.data.root, not as --workdir.")
    if results.exists() and not (checkpoints.exists() and any(checkpoints.iterdir())):
        raise UserError(f"{workdir} holds the results of a run whose checkpoints are gone: use another --workdir.")


def _changes_of(saved: Metadata, metadata: Metadata, config: Config, workdir: Path, accept_changes: bool) -> dict:
    """What the configuration changes of a run on its way, by field, if that is accepted.

    UserError when the workdir holds another run: going on would mix the two.
    """
    root = config.data.root
    changed = differences(Config.read(flat(saved.config) | {"data.root": root}), config)
    fixed = {name: change for name, change in changed.items() if not CHANGEABLE.fullmatch(name)}
    if fixed or changed and not accept_changes:
        words = "; ".join(f"{name}: {change}" for name, change in (fixed or changed).items())
        if is_probe := (workdir / "sweep.json").exists():
            advice = f"; --config.model.pretrained={workdir} starts there from what it found"
        else:
            advice = ", or take the change back to resume it"
            advice += "" if fixed else ", or pass --accept_changes to go on with it from the newest checkpoint"
        raise UserError(
            f"{workdir} holds a run{' of `probe`' * is_probe} with another configuration ({words}): use another "
            f"--workdir{advice}."
        )
    if saved.species != metadata.species:
        raise UserError(
            f"{workdir} holds a run on other classes than {root} has "
            f"({class_differences(saved.species, metadata.species)}): use another --workdir, or the data of that run."
        )
    if saved.fingerprint != metadata.fingerprint:
        raise UserError(
            f"{workdir} holds a run on other records or images than {root} has (its metadata.parquet or prepared.json "
            "differs): use another --workdir, or the data of that run."
        )
    return changed


def _check_agreement(run: Run, group: ProcessGroup) -> None:
    group.agree(
        "what the run starts from",
        {
            "data": run.metadata.fingerprint,
            "step": run.start,
            "evaluated": list(run.selection.evaluations),
            "selection.json": run.selection.checksum,
            "devices": jax.local_device_count(),
            "attention": run.model.kernels.attention.__name__,
        },
        f"All nodes must see the same data and the same {run.workdir}, and have equally many devices of one kind.",
    )
