"""Every field of a run's configuration: its default, its meaning and the check of its value."""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import ml_collections
from ml_collections import config_dict

from vit_nabirds.config.durations import CLOCK, STEPS, Duration, StepRange
from vit_nabirds.errors import ConfigError


class Check(NamedTuple):
    """What a field takes: a test of its value, what to say when it fails, and how text becomes the value."""

    holds: Callable[[Any], bool]
    expected: str
    parse: Callable[[str], Any] | None = None


POSITIVE = Check(lambda x: 0 < x < math.inf, "positive")
COUNT = Check(lambda x: 0 < x <= 10_000, "between 1 and 10,000")
SIZE = Check(lambda x: 0 < x <= 1_000_000, "between 1 and 1,000,000")
NOT_NEGATIVE = Check(lambda x: 0 <= x < math.inf, "0 or more")
SHARE = Check(lambda x: 0 <= x < 1, "at least 0 and less than 1")
SEED = Check(lambda x: 0 <= x < 2**32, "between 0 and 2^32 - 1")
ANY = Check(lambda _: True, "")
PERIOD = Check(lambda x: x.amount > 0 and x.unit != "minute", f"like {STEPS}", Duration.parse)
PERIOD_OR_MINUTES = Check(lambda x: x.amount > 0, f"like {CLOCK}", Duration.parse)
LENGTH = Check(lambda x: x.unit != "minute", f"like {STEPS}", Duration.parse)
STEP_RANGE = Check(lambda _: True, "the first and last step to trace, like '10-12'", StepRange.parse)


def one_of(*values: str) -> Check:
    return Check(lambda x: x in values, " or ".join(map(repr, values)))


def _is_pattern(text: str) -> bool:
    try:
        return bool(text and re.compile(text))
    except re.error:
        return False


PATTERN = Check(_is_pattern, "a regular expression, '.*' for all parameters")


def _field(default: Any, meaning: str, check: Check = ANY, kind: type | None = None) -> Any:
    """A field of a section. Without a default, `kind` is the type of its value."""
    metadata = {"meaning": meaning, "check": check, "kind": kind, "default": default}
    return dataclasses.field(default=check.parse(default) if check.parse else default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Data:
    root: str = _field("", "a folder that `prepare` wrote")
    synthetic: bool = _field(False, "draw an archive of invented birds and prepare it as data.root, once")
    label: str = _field(
        "species", "what a class is: 'species', or 'category' with its plumage (404 or 555 on NABirds)",
        one_of("species", "category"),
    )  # fmt: skip
    validation: float = _field(
        0.1, "share of the training photographs held out to select the best checkpoint; 0 trains on all of them", SHARE
    )
    on_error: str = _field(
        "raise", "'skip' goes on without photographs that cannot be read, and says which", one_of("raise", "skip")
    )
    max_skipped: float = _field(0.01, "largest share of a split that 'skip' may leave out", SHARE)
    workers: int = _field(-1, "loader processes on each host: 0 reads in threads, -1 follows the job's share of CPUs")

    @property
    def tolerated(self) -> float | None:
        """Largest share of a split that may be left out; None: an unreadable photograph ends the run."""
        return self.max_skipped if self.on_error == "skip" else None


@dataclasses.dataclass(frozen=True)
class Model:
    pretrained: str = _field("google/vit-base-patch16-224", "Hub id, folder, or empty for random weights")
    dropout_rate: float = _field(0.0, "share of activations dropped in training", SHARE)
    pool: str | None = _field(
        None, "what the head sees: 'cls', or 'cls+mean' with the patches' mean (default: as the checkpoint has it)",
        one_of("cls", "cls+mean"), str,
    )  # fmt: skip
    image_size: int | None = _field(None, "pixels; positions are resized if the checkpoint has others", SIZE, int)
    patch_size: int | None = _field(None, "of a model with random weights, as all fields below", SIZE, int)
    hidden_size: int | None = _field(None, "width of a token", SIZE, int)
    num_layers: int | None = _field(None, "transformer blocks", COUNT, int)
    num_heads: int | None = _field(None, "attention heads of a block", COUNT, int)
    mlp_dim: int | None = _field(None, "width of a block's MLP", SIZE, int)


SHAPE = ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")  # fields of Model


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = _field("adamw", "'adamw', or 'sgd' with Nesterov momentum", one_of("adamw", "sgd"))
    learning_rate: float = _field(1e-4, "the peak, after warm-up", POSITIVE)
    head_multiplier: float = _field(1.0, "factor on the learning rate of the new classifier", POSITIVE)
    schedule: str = _field("cosine", "'cosine' or 'linear'; both end at 0", one_of("cosine", "linear"))
    warmup: Duration = _field("0 steps", "linear rise of the learning rate", LENGTH)
    weight_decay: float = _field(0.0, "for kernels; none for biases, norms, class token and positions", NOT_NEGATIVE)
    momentum: float = _field(0.9, "for sgd only", SHARE)
    clip_norm: float = _field(0.0, "largest global norm of the gradient; 0 leaves it as it is", NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every: Duration = _field("1 epoch", f"period, like {STEPS}; the last step is always evaluated", PERIOD)
    select: str = _field(
        "accuracy", "figure on the validation photographs that decides the best checkpoint",
        one_of("accuracy", "mean_class_accuracy", "loss"),
    )  # fmt: skip
    patience: int = _field(0, "stop after so many evaluations in a row without a better one; 0: never", NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: Duration = _field(
        "1 epoch", f"period, like {CLOCK}; each evaluation has a checkpoint too", PERIOD_OR_MINUTES
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked configuration. `Config.read` makes one of what the user wrote."""

    seed: int = _field(0, "for the order of the photographs, their augmentation, dropout and new weights", SEED)
    batch_size: int = _field(128, "photographs a step, over all devices of all hosts", POSITIVE)
    epochs: float = _field(10.0, "passes over the training photographs", POSITIVE)
    compute_dtype: str = _field(
        "float32", "'float32' or 'bfloat16'; parameters stay float32", one_of("float32", "bfloat16")
    )
    gradient_dtype: str = _field(
        "float32", "in which gradients are added up over devices: 'bfloat16' sends half the bytes, rounded",
        one_of("float32", "bfloat16"),
    )  # fmt: skip
    trainable: str = _field(".*", "regular expression in parameter paths; 'classifier' trains the head alone", PATTERN)
    cpu_devices: int = _field(1, "without an accelerator, split the CPU into this many devices", COUNT)
    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log_every: int = _field(50, "steps", POSITIVE)
    profile: StepRange = _field("", "'10-12' writes a trace of these steps into the workdir's tensorboard/", STEP_RANGE)
    remat: bool = _field(False, "compute activations again in the backward pass: less memory, up to a third more work")

    @classmethod
    def read(cls, values: Mapping) -> Self:
        """From a ConfigDict or a checkpoint's JSON; a missing field has its default. ConfigError for a wrong value."""
        given = flat(values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values)
        known = {name for name, _ in fields()}
        if unknown := sorted(given.keys() - known):
            raise ConfigError(f"the configuration has the unknown field {unknown[0]!r}: `train --help` lists them all.")
        config = _section(cls, given)
        if not config.data.root:
            raise ConfigError(
                "config.data.root is empty: give the folder that `prepare` wrote: --config.data.root=DIR."
            )
        if config.evaluate.patience and not config.data.validation:
            raise ConfigError(
                f"config.evaluate.patience is {config.evaluate.patience}, but config.data.validation is 0: without "
                "validation photographs nothing says when to stop. Set one of the two."
            )
        if config.data.synthetic and config.model.image_size is None:
            raise ConfigError("config.model.image_size is None: set it, because the birds are drawn at that size.")
        return config

    def to_dict(self) -> dict:
        """The fields as the user writes them, for JSON."""
        return _as_written(self)

    def replace(self, values: dict[str, Any]) -> "Config":
        """With other values of some fields, by dotted name."""
        return Config.read(flat(self.to_dict()) | values)


def fields(section: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """(dotted name, field) of every field."""
    for field in dataclasses.fields(section):
        if field.metadata:
            yield prefix + field.name, field
        else:
            yield from fields(field.default_factory, f"{prefix}{field.name}.")


def default() -> ml_collections.ConfigDict:
    """What every file in `configs/` starts from: each field with its default."""
    return _defaults(Config).lock()


def _defaults(section: type) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        if not field.metadata:
            config[field.name] = _defaults(field.default_factory)
        elif kind := field.metadata["kind"]:
            config[field.name] = config_dict.placeholder(kind)
        else:
            config[field.name] = field.metadata["default"]
    return config


def flat(tree: Mapping, prefix: str = "") -> dict:
    """{'model': {'patch_size': 16}} -> {'model.patch_size': 16}"""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves


# What runs did before these fields existed, where that is not the default.
BEFORE = {"data.validation": 0.0}


def with_defaults(stored: Mapping) -> dict:
    """A stored configuration with a value for each field that it lacks: an earlier version had fewer."""
    complete = default().to_dict()
    for name, value in (BEFORE | flat(stored)).items():
        *sections, last = name.split(".")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), sections, complete)[last] = value
    return complete


def _section(section: type, given: dict, prefix: str = "") -> Any:
    values = {}
    for field in dataclasses.fields(section):
        name = prefix + field.name
        if not field.metadata:
            values[field.name] = _section(field.default_factory, given, f"{name}.")
        elif name in given:
            values[field.name] = _checked(name, given[name], field)
    return section(**values)


def _checked(name: str, value: Any, field: dataclasses.Field) -> Any:
    check = field.metadata["check"]
    if value is None and field.default is None:
        return None
    try:
        parsed = check.parse(value) if check.parse else value
        if check.holds(parsed):
            return parsed
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"config.{name} is {value!r}: it must be {check.expected}.")


def _as_written(section: Any) -> dict:
    written = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if not field.metadata:
            value = _as_written(value)
        written[field.name] = str(value) if isinstance(value, Duration | StepRange) else value
    return written


# What may differ between the runs of one workdir; of these, cpu_devices and remat change the losses, by rounding.
FREE_ON_RESUME = re.compile(
    r"data\.(root|synthetic|on_error|max_skipped|workers)|cpu_devices|checkpoint\..*|evaluate\.(every|patience)|log_every|profile"
    r"|remat|model\.pretrained"
)


def differences(old: Config, new: Config) -> list[str]:
    """'field: old -> new' for each field that differs and that a resumed run may not change."""
    changed = []
    for name in (name for name, _ in fields() if not FREE_ON_RESUME.fullmatch(name)):
        before, after = (operator.attrgetter(name)(config) for config in (old, new))
        if before != after:
            changed.append(f"{name}: {before} -> {after}")
    return changed
