"""Every field of a run's configuration, its default, and the checks on its value."""

import dataclasses
import difflib
import math
import re
from fractions import Fraction
from pathlib import Path

import ml_collections
from ml_collections import config_dict

from vit_nabirds.errors import UserError
from vit_nabirds.parallel.cpus import cpu_share


def default() -> ml_collections.ConfigDict:
    """The fields that every file in `configs/` starts from. A duration is '500 steps', '1 epoch' or '10 minutes'."""
    config = ml_collections.ConfigDict()

    config.seed = 0
    config.batch_size = 128  # global: over all devices of all hosts
    config.epochs = 10.0
    config.compute_dtype = "float32"  # or bfloat16; parameters and optimizer state stay float32
    config.trainable = ".*"  # regular expression searched in parameter paths; 'classifier' trains the head alone
    config.cpu_devices = 1  # on a machine without an accelerator, split its CPU into this many devices

    config.data = ml_collections.ConfigDict()
    config.data.root = ""  # a prepared folder
    config.data.synthetic = False  # draw an archive of invented birds and prepare it as data.root, once
    config.data.workers = -1  # loader processes for each host; 0 reads in threads, -1 follows the job's share of CPUs

    config.model = ml_collections.ConfigDict()
    config.model.pretrained = "google/vit-base-patch16-224"  # Hub id, folder, or empty for random weights
    config.model.dropout_rate = 0.0
    # What the head sees: cls, the class token, or cls+mean, the patches' mean too; unset: as the checkpoint has it.
    config.model.pool = config_dict.placeholder(str)
    # Positions are resized when it is not the checkpoint's.
    config.model.image_size = config_dict.placeholder(int)
    # The shape of a model with random weights; a pretrained one brings its own.
    config.model.patch_size = config_dict.placeholder(int)
    config.model.hidden_size = config_dict.placeholder(int)
    config.model.num_layers = config_dict.placeholder(int)
    config.model.num_heads = config_dict.placeholder(int)
    config.model.mlp_dim = config_dict.placeholder(int)

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"  # or sgd, with Nesterov momentum
    config.optimizer.learning_rate = 1e-4  # the peak, after warm-up
    config.optimizer.head_multiplier = 1.0  # learning rate of the new classifier over that of the rest
    config.optimizer.schedule = "cosine"  # or linear; both end at 0
    config.optimizer.warmup = "0 steps"
    config.optimizer.weight_decay = 0.0  # of kernels; never of biases, norms, class token and positions
    config.optimizer.momentum = 0.9  # of sgd
    config.optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0 leaves it as it is

    config.evaluate = ml_collections.ConfigDict()
    config.evaluate.every = "1 epoch"
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = "1 epoch"
    config.log_every = 50  # steps
    config.profile = ""  # '10-12' writes a trace of these steps into the workdir's tensorboard/
    config.remat = False  # compute activations again in the backward pass: less memory, a third more work
    return config.lock()


SHAPE = ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")  # fields of config.model

# What may differ between the runs of one workdir; of these, cpu_devices and remat change the losses, by rounding.
FREE_ON_RESUME = re.compile(
    r"data\..*|cpu_devices|checkpoint\..*|evaluate\..*|log_every|profile|remat|model\.pretrained"
)


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for a value that no run can have."""

    def require(field: str, ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"config.{field} is {_get(config, field)!r}: it must be {expected}.")

    fields, known = set(flat(config.to_dict())), set(flat(default().to_dict()))
    if fields != known:
        raise UserError(
            f"the configuration lacks {sorted(known - fields)} and has {sorted(fields - known)} too many: let its file "
            "start from vit_nabirds.config.default()."
        )
    if not config.data.root:
        raise UserError(
            "config.data.root is empty: give the folder that `main.py prepare` wrote, e.g. --config.data.root=DIR."
        )
    positive = ["batch_size", "epochs", "cpu_devices", "log_every", "optimizer.learning_rate"]
    for field in positive + ["optimizer.head_multiplier"] + [f"model.{name}" for name in SHAPE]:
        value = _get(config, field)
        require(field, value is None or (math.isfinite(value) and value > 0), "positive")
    for field in ("optimizer.weight_decay", "optimizer.clip_norm"):
        require(field, 0 <= _get(config, field) < math.inf, "0 or more")
    require("seed", 0 <= config.seed < 2**32, "between 0 and 2^32 - 1")
    require("trainable", bool(config.trainable), "a regular expression, '.*' for all parameters")
    most = 4 * cpu_share()
    require(
        "data.workers", -1 <= config.data.workers <= most, f"-1 (automatic), 0 (threads) or at most {most} processes"
    )
    if config.data.synthetic:
        require("model.image_size", config.model.image_size is not None, "set, for the birds are drawn for it")
    for field in ("model.dropout_rate", "optimizer.momentum"):
        require(field, 0 <= _get(config, field) < 1, "at least 0 and less than 1")
    for field, values in {
        "compute_dtype": ("float32", "bfloat16"),
        "model.pool": (None, "cls", "cls+mean"),
        "optimizer.name": ("adamw", "sgd"),
        "optimizer.schedule": ("cosine", "linear"),
    }.items():
        require(field, _get(config, field) in values, " or ".join(map(repr, values)))
    try:
        re.compile(config.trainable)
    except re.error as error:
        raise UserError(f"config.trainable is not a regular expression: {config.trainable!r}: {error}.") from None
    for field in ("optimizer.warmup", "evaluate.every", "checkpoint.every"):
        Duration.parse(config, field)
    profiled_steps(config)


def profiled_steps(config: ml_collections.ConfigDict) -> range:
    """The steps that config.profile names, counted from 1."""
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", config.profile or "0-0")
    if not match or int(match[1]) > int(match[2]) or (config.profile and int(match[1]) == 0):
        raise UserError(f"config.profile is {config.profile!r}: name the first and last step to trace, like '10-12'.")
    return range(int(match[1]), int(match[2]) + 1)


def explain(error: Exception, argv: list[str]) -> str:
    """One line for what Python or ml_collections says of the configuration that a command line asks for."""
    named = [i for i, argument in enumerate(argv) if re.match("--?config(=|$)", argument)][0]
    file = argv[named].partition("=")[2] or "".join(argv[named + 1 : named + 2])
    if isinstance(error, OSError):
        return f"the configuration file {file!r} cannot be read: give the path of one, like configs/birds60.py"
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps them
        error = error.args[0]
    message = str(error.args[0] if error.args else error).strip()
    unknown = re.match(r"Key \"(\w+)\" does not exist", message) or re.match(r"'?(\w+)'?(\nDid you mean|$)", message)
    if unknown and isinstance(error, KeyError | AttributeError):
        given = re.search(rf"--config\.((\w+\.)*{unknown[1]})\b", " ".join(argv))
        name = given[1] if given else unknown[1]

        def likeness(field: str) -> float:
            return max(difflib.SequenceMatcher(None, name, x).ratio() for x in (field, field.rpartition(".")[2]))

        nearest = max(flat(default().to_dict()), key=likeness)
        return f"{given[0] if given else file}: there is no field {name!r}; did you mean {nearest!r}?"
    if "Traceback" in message:
        message = message.splitlines()[-1]
    return f"{file}: {type(error).__name__}: {' '.join(message.split())}"


@dataclasses.dataclass(frozen=True)
class Duration:
    """A period: one of its three units is set."""

    steps: Fraction | None = None
    epochs: Fraction | None = None
    minutes: Fraction | None = None

    @classmethod
    def parse(cls, config: ml_collections.ConfigDict, field: str) -> "Duration":
        """The Duration that a field spells; only warm-up may be 0, and only checkpoints go by the clock."""
        text, clock = _get(config, field), field == "checkpoint.every"
        match = re.fullmatch(r"\s*(\d+|\d+\.\d+(?!\s*step))\s*(step|epoch|minute)s?\s*", text)
        if not match or (match[2] == "minute" and not clock) or not (float(match[1]) or field == "optimizer.warmup"):
            forms = "'500 steps', '1 epoch' or '10 minutes'" if clock else "'500 steps' or '1 epoch'"
            raise UserError(f"config.{field} is {text!r}: write it like {forms}.")
        return cls(**{match[2] + "s": Fraction(match[1])})

    def in_steps(self, steps_per_epoch: Fraction) -> Fraction | None:
        """The period in steps; None when it is one of time."""
        return self.steps if self.epochs is None else self.epochs * steps_per_epoch


def is_due(step: int, period: Fraction | None) -> bool:
    """Whether a period (in steps, perhaps not whole) ends with this step; None: it goes by the clock."""
    return period is not None and step // period > (step - 1) // period


def resolve(config: ml_collections.ConfigDict, architecture: dict) -> ml_collections.ConfigDict:
    """The configuration with the model's shape filled in; UserError when it asks for another one."""
    config = config.copy_and_resolve_references()
    config.data.root = str(Path(config.data.root).resolve())
    for field in SHAPE:
        value = architecture["img_size" if field == "image_size" else field]
        if config.model[field] not in (None, value):
            raise UserError(
                f"config.model.{field} is {config.model[field]}, but {config.model.pretrained or 'the checkpoint'} has "
                f"{value}: leave it out, or empty config.model.pretrained for random weights."
            )
        config.model[field] = value
    config.model.pool = architecture.get("pool", "cls")
    return config


def differences(old: dict, new: dict) -> list[str]:
    """'field: old -> new' for each field that differs and that a resumed run may not change."""
    old, new = flat(old), flat(new)
    fields = [f for f in sorted(old | new) if not FREE_ON_RESUME.fullmatch(f) and old.get(f) != new.get(f)]
    return [f"{field}: {old.get(field)!r} -> {new.get(field)!r}" for field in fields]


def flat(tree: dict, prefix: str = "") -> dict:
    """{'model': {'patch_size': 16}} -> {'model.patch_size': 16}"""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _get(config: ml_collections.ConfigDict, field: str):
    for name in field.split("."):
        config = config[name]
    return config
