"""Every field of a run's configuration: its default, its meaning and the check of its value."""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import ml_collections
from ml_collections import config_dict

from vit_nabirds.config.durations import CLOCK, STEPS, Duration, StepRange
from vit_nabirds.config.path_rules import PathRules
from vit_nabirds.errors import ConfigError, shown, visible


class Check(NamedTuple):
    """What a field takes: a test of its value, what to say when it fails, and how text becomes the value."""

    holds: Callable[[Any], bool]
    expected: str
    parse: Callable[[str], Any] | None = None


MOST = 10**9  # far above what means something, and far below what overflows
POSITIVE = Check(lambda x: 0 < x <= MOST, "positive, and at most 1e9")
COUNT = Check(lambda x: 0 < x <= 10_000, "between 1 and 10,000")
SIZE = Check(lambda x: 0 < x <= 1_000_000, "between 1 and 1,000,000")
DEVICES = Check(lambda x: 0 < x <= 1_024, "between 1 and 1,024")
NOT_NEGATIVE = Check(lambda x: 0 <= x <= MOST, "0 or more, and at most 1e9")
SHARE = Check(lambda x: 0 <= x < 1, "at least 0 and less than 1")
SHARE_OR_ALL = Check(lambda x: 0 < x <= 1, "above 0 and at most 1")
SEED = Check(lambda x: 0 <= x < 2**32, "between 0 and 2^32 - 1")
ANY = Check(lambda _: True, "")
PERIOD = Check(lambda x: x.amount > 0 and x.unit != "minute", f"like {STEPS}", Duration.parse)
PERIOD_OR_MINUTES = Check(lambda x: x.amount > 0, f"like {CLOCK}", Duration.parse)
MINUTES = Check(lambda x: x.unit == "minute", "like '10 minutes'", Duration.parse)
LENGTH = Check(lambda x: x.unit != "minute", f"like {STEPS}", Duration.parse)
STEP_RANGE = Check(lambda _: True, "the first and last step to trace, like '10-12'", StepRange.parse)
PATH_RULES = Check(lambda _: True, "text, like 'cls_token lr=0.1 wd=0; embeddings frozen'", PathRules.parse)


def one_of(*values: str) -> Check:
    return Check(lambda x: x in values, " or ".join(map(repr, values)))


def within(low: float, high: float) -> Check:
    """A pair (least, most) of numbers in a range, the first not above the second."""
    return Check(
        lambda pair: len(pair) == 2 and low <= pair[0] <= pair[1] <= high,
        f"two numbers from {low:g} to {high:g}, the smaller one first",
        lambda pair: tuple(map(float, pair)),
    )


def _is_pattern(text: str) -> bool:
    try:
        return bool(text and re.compile(text))
    except (re.error, OverflowError, RecursionError):
        return False


PATTERN = Check(_is_pattern, "a regular expression, '.*' for all parameters")


TRACKERS = ("tensorboard", "mlflow", "wandb")


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    """'mlflow,wandb', as a command line has it, or several of such texts."""
    text = ",".join([value] if isinstance(value, str) else value)
    return tuple(filter(None, map(str.strip, text.split(","))))


TRACK = Check(lambda x: set(x) <= set(TRACKERS), f"out of {', '.join(TRACKERS)}, separated by commas", _names)
REMAT = one_of("none", "elementwise", "blocks")._replace(
    parse=lambda x: {"True": "blocks", "False": "none"}.get(str(x).capitalize(), x)  # it was a bool
)


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
    sampling: str = _field(
        "uniform", "how often a class is drawn: 'uniform' as often as it has photographs, 'balanced' as often as any "
        "other, 'sqrt' in between", one_of("uniform", "sqrt", "balanced"),
    )  # fmt: skip
    repeats: int = _field(1, "times that a photograph is in a batch, augmented differently each time", COUNT)
    workers: int = _field(-1, "loader processes on each host: 0 reads in threads, -1 follows the job's share of CPUs")

    @property
    def tolerated(self) -> float | None:
        """Largest share of a split that may be left out; None: an unreadable photograph ends the run."""
        return self.max_skipped if self.on_error == "skip" else None


@dataclasses.dataclass(frozen=True)
class Model:
    pretrained: str = _field(
        "google/vit-base-patch16-224", "Hub id, folder of a checkpoint, workdir of a run, or empty for random weights"
    )
    dropout_rate: float = _field(0.0, "share of activations dropped in training", SHARE)
    drop_path: float = _field(
        0.0, "share of images that skip the last block's branches, falling to 0 at the first", SHARE
    )
    head_stddev: float = _field(0.0, "of the new classifier's random weights; 0 starts from zeros", NOT_NEGATIVE)
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
class Augment:
    crop: str = _field(
        "random", "'random' as large as the model's images, or 'resized' from a random area and shape",
        one_of("random", "resized"),
    )  # fmt: skip
    area: tuple[float, float] = _field((0.08, 1.0), "share of the image that a 'resized' crop takes", within(0.01, 1))
    aspect: tuple[float, float] = _field((0.75, 4 / 3), "width by height of a 'resized' crop", within(0.1, 10))
    flip: bool = _field(True, "half of the images, left to right")
    contrast: tuple[float, float] = _field((0.8, 1.2), "factor on the contrast; (1, 1): none", within(0, 10))
    gamma: tuple[float, float] = _field((0.6, 1.2), "exponent of the brightness; (1, 1): none", within(0.1, 10))
    color_jitter: float = _field(0.0, "largest change of brightness, contrast and saturation, as a share", SHARE)
    policy: str = _field(
        "none", "'randaugment' or 'trivialaugment': random operations on each image",
        one_of("none", "randaugment", "trivialaugment"),
    )  # fmt: skip
    operations: int = _field(2, "of 'randaugment' on each image", COUNT)
    magnitude: float = _field(9.0, "of 'randaugment', from 0 to 30", Check(lambda x: 0 <= x <= 30, "from 0 to 30"))
    erasing: float = _field(0.0, "share of images of which a random rectangle is erased", SHARE)
    mixup: float = _field(0.0, "alpha of the Beta distribution by which two images are blended; 0: none", NOT_NEGATIVE)
    cutmix: float = _field(
        0.0, "the same for pasting a part of one into the other; with both, one of the two", NOT_NEGATIVE
    )
    mixed: float = _field(1.0, "share of the pairs that are mixed", SHARE_OR_ALL)


@dataclasses.dataclass(frozen=True)
class Loss:
    name: str = _field(
        "cross_entropy", "'cross_entropy', or 'binary' cross-entropy of each class by itself",
        one_of("cross_entropy", "binary"),
    )  # fmt: skip
    label_smoothing: float = _field(0.0, "share of each label that is spread over all classes", SHARE)
    class_weights: str = _field(
        "none", "'balanced' weighs each class by the inverse of its number of training photographs",
        one_of("none", "balanced"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = _field(
        0, "train low-rank changes of the weights, and the classifier, only; 0: the weights themselves",
        Check(lambda x: 0 <= x <= 10_000, "between 0 and 10,000"),
    )  # fmt: skip
    alpha: float = _field(16.0, "the changes are multiplied by alpha / rank", POSITIVE)
    targets: str = _field("attn|mlp", "regular expression in the paths of the layers that are changed", PATTERN)


@dataclasses.dataclass(frozen=True)
class Mesh:
    fsdp: int = _field(
        1, "devices that share one copy of parameters and optimizer state; -1: all devices of a node",
        Check(lambda x: x == -1 or 0 < x <= 10_000, "-1, or between 1 and 10,000"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str = _field(
        "adamw", "'adamw', 'lion', 'muon', or 'sgd' with Nesterov momentum", one_of("adamw", "sgd", "lion", "muon")
    )
    learning_rate: float = _field(1e-4, "the peak, after warm-up", POSITIVE)
    head_multiplier: float = _field(1.0, "factor on the learning rate of the new classifier", POSITIVE)
    layer_decay: float = _field(1.0, "factor on the learning rate from each block to the one before it", SHARE_OR_ALL)
    rules: PathRules = _field(
        "", "'PATTERN lr=0.1 wd=0; PATTERN frozen': for parameters whose path has the regular expression, a factor on "
        "the learning rate in place of the two above, a weight decay, no training; the first that matches counts",
        PATH_RULES,
    )  # fmt: skip
    schedule: str = _field(
        "cosine", "'cosine', 'linear' or 'constant'; all but the last end at 0", one_of("cosine", "linear", "constant")
    )
    warmup: Duration = _field("0 steps", "linear rise of the learning rate", LENGTH)
    cooldown: Duration = _field("0 steps", "linear fall of a 'constant' learning rate to 0 at the end", LENGTH)
    weight_decay: float = _field(
        0.0, "for kernels; none for biases, norms, class token, positions and layer scales", NOT_NEGATIVE
    )
    moment_dtype: str = _field(
        "float32", "of the first moments; 'bfloat16' halves their memory", one_of("float32", "bfloat16")
    )
    momentum: float = _field(0.9, "for sgd only", SHARE)
    clip_norm: float = _field(0.0, "largest global norm of the gradient; 0 leaves it as it is", NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every: Duration = _field("1 epoch", f"period, like {STEPS}; the last step is always evaluated", PERIOD)
    select: str = _field(
        "accuracy", "figure on the validation photographs that decides the best checkpoint",
        one_of("accuracy", "mean_class_accuracy", "loss"),
    )  # fmt: skip
    views: str = _field(
        "one", "of each photograph, whose logits are averaged: 'one', 'flip' (and its mirror image), or 'ten' (and "
        "four closer crops, with theirs)", one_of("one", "flip", "ten"),
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
    batch_size: int = _field(128, "photographs a step, over all devices of all hosts", SIZE)
    epochs: float = _field(10.0, "passes over the training photographs", POSITIVE)
    compute_dtype: str = _field(
        "float32", "'float32' or 'bfloat16'; parameters stay float32", one_of("float32", "bfloat16")
    )
    gradient_dtype: str = _field(
        "float32", "in which gradients are added up over devices: 'bfloat16' sends half the bytes, rounded",
        one_of("float32", "bfloat16"),
    )  # fmt: skip
    microbatch: int = _field(
        0, "photographs that a device works on at once, whose gradients are added up; 0: all of its share, -1: the "
        "largest power of two that fits", Check(lambda x: -1 <= x <= 1_000_000, "-1, 0 or the number of photographs"),
    )  # fmt: skip
    ema_decay: float = _field(
        0.0, "of the moving average of the parameters, which is evaluated and exported; 0: none", SHARE
    )
    trainable: str = _field(".*", "regular expression in parameter paths; 'classifier' trains the head alone", PATTERN)
    cpu_devices: int = _field(1, "without an accelerator, split the CPU into this many devices", DEVICES)
    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    augment: Augment = dataclasses.field(default_factory=Augment)
    loss: Loss = dataclasses.field(default_factory=Loss)
    lora: Lora = dataclasses.field(default_factory=Lora)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    evaluate: Evaluate = dataclasses.field(default_factory=Evaluate)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    stop_signals: str = _field(
        "TERM,INT,USR1,USR2", "signals that save and stop the run, of these four; the others are ignored",
        Check(lambda x: set(x.split(",")) <= {"TERM", "INT", "USR1", "USR2"}, "out of TERM,INT,USR1,USR2, with commas"),
    )  # fmt: skip
    max_bad_steps: int = _field(
        10, "the run ends after so many steps in a row whose loss or gradient is not finite; they change nothing", COUNT
    )
    watchdog_timeout: Duration = _field(
        "10 minutes", "the job ends, to be started again, when a process has not moved for so long; 0 minutes: never",
        MINUTES,
    )  # fmt: skip
    log_every: int = _field(50, "steps", POSITIVE)
    track: tuple[str, ...] = _field(
        ("tensorboard",), "where curves go: 'mlflow' and 'wandb' too, or one of them; 'tensorboard' always", TRACK
    )
    profile: StepRange = _field("", "'10-12' writes a trace of these steps into the workdir's tensorboard/", STEP_RANGE)
    remat: str = _field(
        "none", "what the backward pass computes again, for less memory: 'blocks' whole (up to a third more work), or "
        "'elementwise' all but their matrix products", REMAT,
    )  # fmt: skip

    @classmethod
    def read(cls, values: Mapping) -> Self:
        """From a ConfigDict or a checkpoint's JSON; a missing field has its default. ConfigError for a wrong value."""
        given = flat(values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values)
        check_names(given)
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
        if config.loss.class_weights != "none" and config.data.sampling != "uniform":
            raise ConfigError(
                f"config.loss.class_weights is {config.loss.class_weights!r} and config.data.sampling "
                f"{config.data.sampling!r}: both make up for rare classes. Set one of the two."
            )
        for name, condition, what in IDLE:
            if not condition(config) and operator.attrgetter(name)(config) != _default_of(name):
                raise ConfigError(f"config.{name} is set, but has no effect without {what}.")
        if config.lora.rank and config.trainable != ".*":
            raise ConfigError(
                f"config.lora.rank is not 0, so its changes and the classifier are trained, but config.trainable is "
                f"{config.trainable!r}: leave it out, and freeze some of them by config.optimizer.rules."
            )
        if config.lora.rank and not config.model.pretrained:
            raise ConfigError(
                "config.lora.rank is not 0, but there are no weights to change: set config.model.pretrained."
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


# Fields that mean nothing without another one: condition, and its name for the message.
IDLE = (
    ("augment.area", lambda c: c.augment.crop == "resized", "config.augment.crop=resized"),
    ("augment.aspect", lambda c: c.augment.crop == "resized", "config.augment.crop=resized"),
    ("augment.operations", lambda c: c.augment.policy == "randaugment", "config.augment.policy=randaugment"),
    ("augment.magnitude", lambda c: c.augment.policy == "randaugment", "config.augment.policy=randaugment"),
    ("lora.alpha", lambda c: c.lora.rank, "config.lora.rank"),
    ("lora.targets", lambda c: c.lora.rank, "config.lora.rank"),
    ("optimizer.momentum", lambda c: c.optimizer.name == "sgd", "config.optimizer.name=sgd"),
    ("data.max_skipped", lambda c: c.data.on_error == "skip", "config.data.on_error=skip"),
    ("evaluate.select", lambda c: c.data.validation, "config.data.validation"),
    ("augment.mixed", lambda c: c.augment.mixup or c.augment.cutmix, "config.augment.mixup or config.augment.cutmix"),
)


def check_names(values: Mapping) -> None:
    """ConfigError for a dotted name that no field has."""
    if unknown := sorted(values.keys() - {name for name, _ in fields()}):
        raise ConfigError(
            f"the configuration has the unknown field {shown(unknown[0])}: `train --help` lists them all."
        )


def _default_of(name: str) -> Any:
    return next(field.default for other, field in fields() if other == name)


def fields(section: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """(dotted name, field) of every field."""
    for field in dataclasses.fields(section):
        if field.metadata:
            yield prefix + field.name, field
        else:
            yield from fields(field.default_factory, f"{prefix}{field.name}.")


def short_name(name: str) -> str:
    """'learning_rate' of 'optimizer.learning_rate', but 'optimizer.name', because another section has a name too."""
    last = name.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other, _ in fields()].count(last) == 1 else name


def value_in_words(value: Any) -> str:
    """A field's value, so that it can be told from others."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(value_in_words, value))})"
    return f"{value:.6g}" if isinstance(value, float) else visible(str(value)) or "''"


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


DEEPEST = 2  # sections in each other that are looked into; ours have none in them


def flat(tree: Mapping, prefix: str = "") -> dict:
    """{'model': {'patch_size': 16}} -> {'model.patch_size': 16}"""
    leaves = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping) and prefix.count(".") < DEEPEST
        leaves |= flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return leaves


# What runs did before these fields existed, where that is not the default.
BEFORE = {"data.validation": 0.0}


def with_defaults(stored: Mapping) -> dict:
    """A stored configuration with a value for each field that it lacks: an earlier version had fewer. ConfigError for a
    field that there is not."""
    complete, values = default().to_dict(), BEFORE | flat(stored)
    check_names(values)
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        (complete[section] if section else complete)[last] = value
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
    check, kind = field.metadata["check"], kind_of(field)
    if value is None and field.default is None:
        return None
    try:
        if kind.has(value):
            parsed = check.parse(value) if check.parse else value
            if check.holds(parsed):
                return float(parsed) if kind is KINDS[float] and not check.parse else parsed
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"config.{name} is {shown(value)}: it must be {expected_of(field)}.")


class Kind(NamedTuple):
    """What a field's value is, and whether something is that."""

    name: str
    has: Callable[[Any], bool]


KINDS = {
    bool: Kind("True or False", lambda x: isinstance(x, bool)),
    int: Kind("a whole number", lambda x: isinstance(x, int) and not isinstance(x, bool)),
    float: Kind("a number", lambda x: isinstance(x, float | int) and not isinstance(x, bool)),
    str: Kind("text of at most 10,000 characters", lambda x: isinstance(x, str) and len(x) <= 10_000 and "\0" not in x),
    tuple: Kind("a pair of numbers", lambda x: isinstance(x, tuple | list)),
}
PARSED = Kind("text", lambda _: True)  # by a parser that refuses other types


def kind_of(field: dataclasses.Field) -> Kind:
    default = field.metadata["default"]
    is_parsed = field.metadata["check"].parse and isinstance(default, str)
    return PARSED if is_parsed else KINDS[field.metadata["kind"] or type(default)]


def expected_of(field: dataclasses.Field) -> str:
    """What a field takes, in words."""
    kind, expected = kind_of(field), field.metadata["check"].expected
    return f"{expected}, and {kind.name}" if expected and kind is KINDS[int] else expected or kind.name


def _as_written(section: Any) -> dict:
    written = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if not field.metadata:
            value = _as_written(value)
        written[field.name] = str(value) if isinstance(value, Duration | StepRange | PathRules) else value
    return written


# What may differ between the runs of one workdir; of these, cpu_devices, microbatch, mesh.fsdp and remat change
# the losses, by rounding.
FREE_ON_RESUME = re.compile(
    r"data\.(root|synthetic|on_error|max_skipped|workers)|cpu_devices|checkpoint\..*|evaluate\.(every|patience)|log_every|profile"
    r"|max_bad_steps|watchdog_timeout|stop_signals|remat|microbatch|mesh\.fsdp|model\.pretrained|track"
)


# What a run may change on its way with --accept_changes: how it goes on, but not what it has learned on and with.
CHANGEABLE = re.compile(
    r"epochs|augment\..*|loss\..*|data\.(sampling|repeats)|model\.(dropout_rate|drop_path)|ema_decay|evaluate\.(select|views)"
    r"|optimizer\..*|compute_dtype|gradient_dtype|seed"
)


def differences(old: Config, new: Config) -> dict[str, str]:
    """'old -> new' by field, of each that differs and that a resumed run may not change without being told to."""
    changed = {}
    for name in (name for name, _ in fields() if not FREE_ON_RESUME.fullmatch(name)):
        before, after = (operator.attrgetter(name)(config) for config in (old, new))
        if before != after:
            changed[name] = f"{before} -> {after}"
    return changed
