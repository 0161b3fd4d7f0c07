"""The configuration on the command line: its file, `--config.x.y=value`, and what to say of mistakes in them."""

import contextlib
import copy
import difflib
import re
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from vit_nabirds.config.fields import default, expected_of, fields, flat
from vit_nabirds.errors import ConfigError, shown

# What other programs call our fields.
ALIASES = {
    "lr": "optimizer.learning_rate", "wd": "optimizer.weight_decay", "opt": "optimizer.name", "bs": "batch_size",
    "num_epochs": "epochs", "dtype": "compute_dtype", "dropout": "model.dropout_rate", "img_size": "model.image_size",
    "ema": "ema_decay", "mixup_alpha": "augment.mixup", "cutmix_alpha": "augment.cutmix", "tta": "evaluate.views",
    "smoothing": "loss.label_smoothing", "reprob": "augment.erasing", "randaugment": "augment.policy",
    "accumulate": "microbatch", "gradient_accumulation": "microbatch", "grad_accum_steps": "microbatch",
    "layerwise_decay": "optimizer.layer_decay", "fsdp": "mesh.fsdp", "lora_rank": "lora.rank",
    "grad_clip": "optimizer.clip_norm", "clip": "optimizer.clip_norm", "num_workers": "data.workers",
    "data_dir": "data.root",
}  # fmt: skip


class ConfigFile(config_flags.ConfigFileFlagParser):
    """Reads a configuration file, and refuses one that gives no configuration before fields are set in it."""

    def parse(self, path: str) -> ConfigDict:
        sys.modules.pop(f"{self.name}_config", None)  # of an earlier call: a file without get_config would have its
        file = path.split(":")[0]
        if file.endswith(".json"):
            raise ConfigError(f"{file} is no configuration file: give one of Python, like configs/demo.py.")
        config = super().parse(path)
        if not isinstance(config, ConfigDict):
            with contextlib.suppress(AttributeError):
                config.lock()  # raises what went wrong when the file was read
            raise ConfigError(f"{file}: get_config returns {shown(config)}: let it return what config.default() made.")
        return config


def help_text() -> str:
    """A line for each field: name, default and meaning."""
    rows = [(f"--config.{name}={field.metadata['default']!r}", field.metadata["meaning"]) for name, field in fields()]
    return "\n".join(f"  {name:<58} {meaning}" for name, meaning in rows)


def nearest(name: str) -> str | None:
    """The field that a wrong name means; None if none is like it."""
    last = name.rpartition(".")[2]
    if last in ALIASES:
        return ALIASES[last]

    def likeness(field: str) -> float:
        return max(difflib.SequenceMatcher(None, name, x).ratio() for x in (field, field.rpartition(".")[2]))

    best = max((field for field, _ in fields()), key=likeness)
    return best if likeness(best) > 0.65 else None


def suggestion(name: str) -> str:
    """The end of a message on a wrong name."""
    field = nearest(name)
    return f"did you mean --config.{field}?" if field else "`train --help` lists all fields."


def explain_value(message: str) -> str | None:
    """One line for what absl says of a flag whose text is no value of a field; None for another message."""
    wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if wrong is None:
        return None
    known, start = dict(fields()), f"config.{wrong[1]} is {shown(wrong[2])}"
    if wrong[1] in known:
        return f"{start}: it must be {expected_of(known[wrong[1]])}."
    examples = [name for name in known if name.startswith(f"{wrong[1]}.")]
    return f"{start}, but it is a section: set a field of it, like --config.{examples[0]}." if examples else None


def explain(error: Exception, argv: list[str]) -> str:
    """One line for what Python or ml_collections raised about the configuration that a command line asks for."""
    named = next(i for i, argument in enumerate(argv) if re.match("--?config(=|$)", argument))
    file = argv[named].partition("=")[2] or "".join(argv[named + 1 : named + 2])
    if isinstance(error, OSError):
        return f"the configuration file {file!r} cannot be read: give the path of one, like configs/birds60.py"
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps them
        error = error.args[0]
    message = str(error.args[0] if error.args else error).strip()
    if isinstance(error, TypeError) and (part := re.search(r"--config\.([\w.]+)\.\w+(=|$)", " ".join(argv))):
        if part[1] in dict(fields()):
            return f"{part[0].rstrip('=')}: config.{part[1]} is a field and has no parts."
    if isinstance(error, SyntaxError):
        return f"{file}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    if isinstance(error, AttributeError) and "attribute 'get_config'" in message:
        return f"{file} has no function get_config, which returns the configuration: see configs/demo.py."
    unknown = re.match(r"Key \"(\w+)\" does not exist", message) or re.match(r"'?(\w+)'?(\nDid you mean|$)", message)
    if unknown and isinstance(error, KeyError | AttributeError):
        given = re.search(rf"--config\.((\w+\.)*{unknown[1]})\b", " ".join(argv))
        name = given[1] if given else unknown[1]
        return f"{given[0] if given else file}: there is no field {name!r}; {suggestion(name)}"
    if "Traceback" in message:
        message = message.splitlines()[-1]
    return f"{file}: {type(error).__name__}: {' '.join(message.split())}"


def as_field(flag: str) -> str | None:
    """What a flag without `config.` probably means: --epochs=3 is --config.epochs=3."""
    names = [*flat(default().to_dict()), *ALIASES]
    return nearest(flag) if any(flag in (name, name.rpartition(".")[2]) for name in names) else None


def value_of(config: ConfigDict, name: str, text: str) -> Any:
    """What a flag --config.NAME=TEXT would make of a field. ConfigError for another name, or another kind of value."""
    if name not in dict(fields()):
        meant = nearest(name.removeprefix("config."))
        advice = f"did you mean {meant}?" if meant else "`train --help` lists all fields."
        raise ConfigError(f"there is no field {shown(name)}; {advice}")
    values, argv = flags.FlagValues(), [f"--config.{name}={text}"]
    config_flags.DEFINE_config_dict("config", copy.deepcopy(config), flag_values=values, sys_argv=argv)
    try:
        values(["", *argv])
    except flags.Error as error:
        raise ConfigError(explain_value(str(error)) or " ".join(str(error).split())) from None
    return flat(values.config.to_dict())[name]
