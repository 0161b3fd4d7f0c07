"""The command line: a command, its flags, and what becomes of errors."""

import contextlib
import difflib
import importlib
import logging
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType

from absl import flags
from absl import logging as absl_logging

from vit_nabirds.errors import ConfigError, UserError, say, shown, visible
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.join import join
from vit_nabirds.parallel.preemption import EXIT_STOPPED, SIGNALS

COMMANDS = (
    "train", "probe", "prepare", "check", "sweep", "compare", "evaluate", "report", "predict", "export", "verify",
)  # fmt: skip
CONFIGS = Path(__file__).parent.parent / "configs"
EXIT_CODES = (
    "Exit codes: 0 finished; 75 stopped on request, all saved: run the same command again; 74 trouble of this machine "
    "or its storage, which may be gone later; 2 wrong usage; 1 other failure."
)
CLUSTER = {
    "coordinator": (str, "HOST:PORT of process 0 (default: from the launcher)."),
    "num_processes": (int, "Number of processes (default: from the launcher; else 1)."),
    "process_id": (int, "Number of this process, from 0 on (default: from the launcher)."),
    "start_timeout": (300, "Seconds for all processes to meet."),
    "allow_idle_gpus": (False, "Train also where GPUs of the job would be idle."),
}
KINDS = {
    str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_boolean,
    list: flags.DEFINE_multi_string,
}  # fmt: skip
STOPPED = "stopped: run the same command again to go on"
HELP = {"--help", "-help", "-h"}


def console() -> None:
    """The program. A signal to stop before the work begins stops it at once: nothing is lost."""
    for number in SIGNALS:
        signal.signal(number, _stop_at_once)
    for name in ("stdin", "stdout", "stderr"):  # some daemons start programs with closed ones
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    code = main(sys.argv[1:])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # all is done
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # `help | head -1`: nobody reads on, and Python would fail at its own last flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def main(argv: list[str]) -> int:
    """Run one command, like ['predict', '--model=my-birds', ...], and return its exit code. From Python, too."""
    group = ProcessGroup()
    try:
        if argv and argv[0] in {"help"} | HELP:
            return _show(overview())
        name, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
        if name not in COMMANDS:
            raise ConfigError(f"there is no command {shown(name)}: it is one of {', '.join(COMMANDS)}, help")
        command = importlib.import_module(f"vit_nabirds.commands.{name}")
        if HELP & set(argv):
            return _show(help_of(name, command))
        log_to_stderr()
        try:
            options = parse(name, command, argv)
        except ConfigError:
            with contextlib.suppress(UserError):  # all tasks fail alike: let one of them say why
                group = join()
            raise
        if command.PARALLEL:
            group = join(*(options[name].value for name in CLUSTER))
            if not group.is_writer:
                logging.getLogger("vit_nabirds").setLevel(logging.ERROR)
        elif signal.getsignal(signal.SIGINT) is _stop_at_once:  # alone, it can clean up
            for number in SIGNALS:
                signal.signal(number, _stop_and_clean_up)
        return command.run(options, group)
    except Exception as error:
        return group.fail_with(error)


def parse(name: str, command: ModuleType, argv: list[str]) -> flags.FlagValues:
    """The command's flags; ConfigError for a mistake."""
    from vit_nabirds.config.flags import explain, explain_value

    values = flags_of(command, argv := with_configuration(command, argv))
    positional = getattr(command, "POSITIONAL", None)  # the flag whose values may also be given without its name
    values.set_gnu_getopt(positional is not None)  # and before others
    try:
        rest = values([name, *argv])[1:]
        if rest and positional is None:
            raise ConfigError(f"unexpected argument {shown(rest[0])}: write --FLAG=VALUE; `{name} --help` lists flags.")
        if rest:
            values[positional].value = [*values[positional].value, *rest]
        if "config" in values:
            values.config.lock()  # raises what went wrong when the file was loaded
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(unknown_flag(error.flagname, name, values)) from None
    except UserError:
        raise
    except Exception as error:  # of a flag, or anything that the user's configuration file may raise
        if "config" not in values or (isinstance(error, flags.Error) and "Traceback" not in str(error)):
            text = explain_value(str(error)) or wrong_value(str(error), values) or " ".join(str(error).split())
            raise ConfigError(text) from None
        raise ConfigError(explain(error, argv)) from None
    if missing := [f"--{flag}" for flag in command.REQUIRED if values[flag].value in (None, [])]:
        raise ConfigError(f"{name} needs {' and '.join(missing)}")
    if empty := [flag for flag in command.FLAGS if values[flag].value == ""]:  # of a shell's variable without a value
        raise ConfigError(f"--{empty[0]} is empty: give it a value, or leave it out.")
    refuse_addresses(values)
    return values


def unknown_flag(flag: str, name: str, values: flags.FlagValues) -> str:
    """What to say of a flag that the command `name` does not have."""
    from vit_nabirds.config.flags import as_field

    start = f"`{name}` has no flag --{flag}"
    if "config" in values and (field := as_field(flag)):
        return f"{start}; did you mean --config.{field}?"
    if like := difflib.get_close_matches(flag, [known for known in values if "." not in known], n=1, cutoff=0.7):
        return f"{start}; did you mean --{like[0]}?"
    commands = {other: importlib.import_module(f"vit_nabirds.commands.{other}") for other in COMMANDS}
    others = [
        other for other, command in commands.items()
        if flag in command.FLAGS or (flag == "config" and command.CONFIGURED)
    ]  # fmt: skip
    elsewhere = f", which is a flag of {', '.join(f'`{other}`' for other in others)}" if others else ""
    return f"{start}{elsewhere}: `{name} --help` lists its flags."


def wrong_value(message: str, values: flags.FlagValues) -> str | None:
    """One line for what absl says of a flag whose text is no value of its type; None for another message."""
    wrong = re.match(r"flag --(\w+)=(.*?): ", message, re.DOTALL)
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    kind = wrong and wrong[1] in values and kinds.get(values[wrong[1]].flag_type())
    return f"--{wrong[1]} is {shown(wrong[2])}: give {kind}." if kind else None


def refuse_addresses(values: flags.FlagValues) -> None:
    """ConfigError for an address like gs://bucket/run, which would be taken for a folder in the current one."""
    given = {flag: value for flag, value in values.flag_values_dict().items() if flag != "config"}
    if "config" in values:
        from vit_nabirds.config.fields import flat

        fields = flat(values.config.to_dict())  # --config.model={} leaves a section without fields
        given |= {f"config.{name}": fields.get(name) for name in ("data.root", "model.pretrained")}
    for flag, value in given.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search(r"(^|[=,])[A-Za-z][A-Za-z0-9+.-]*:/", text):
                raise ConfigError(
                    f"--{flag}={text} is an address, and the program reads and writes files: mount that storage (as "
                    "gcsfuse and s3fs do) and give the folder, or copy it here."
                )


def with_configuration(command: ModuleType, argv: list[str]) -> list[str]:
    """The arguments with the command's default configuration where it takes one and none is named."""
    named = any(argument.lstrip("-").partition("=")[0] == "config" for argument in argv if argument.startswith("-"))
    return argv if named or not command.CONFIGURED else [f"--config={CONFIGS / command.CONFIGURED}", *argv]


def flags_of(command: ModuleType, argv: list[str]) -> flags.FlagValues:
    """absl flags of the command's FLAGS: {name: (default or, without one, type; help)}."""
    values = flags.FlagValues()
    for name, (default, text) in (command.FLAGS | (CLUSTER if command.PARALLEL else {})).items():
        kind, default = (default, None) if isinstance(default, type) else (type(default), default)
        KINDS[kind](name, default, text, flag_values=values)
    if command.CONFIGURED:
        from ml_collections import config_flags

        from vit_nabirds.config.flags import ConfigFile

        text = "Configuration file; --config.x.y=value changes a field."
        config_flags.DEFINE_config_file("config", None, text, flag_values=values, sys_argv=argv)
        values["config"].parser = ConfigFile("config")
    return values


class Visible(logging.Formatter):
    """What a line quotes of files must not move the terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n\t")


def log_to_stderr() -> None:
    log = logging.getLogger("vit_nabirds")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(Visible("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs every step it takes, and raises its errors too
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it lists each read that another one's failure ended
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def overview() -> str:
    from vit_nabirds.commands.invocation import program

    lines = [f"  {name:<9} {doc(name)}" for name in COMMANDS]
    usage = f"usage: {program()} COMMAND [--FLAG=VALUE ...]    (COMMAND --help lists its flags; without one: train)"
    return "\n".join(["Fine-tune Vision Transformers on photographs of birds.", "", usage, "", *lines, "", EXIT_CODES])


def help_of(name: str, command: ModuleType) -> str:
    from vit_nabirds.config.flags import help_text

    values = flags_of(command, [])
    lines = [f"{name}: {doc(name)}", "", "flags:"]
    for flag in sorted(set(values) - {"config"}):
        default = "" if values[flag].default in (None, []) else f" (default: {values[flag].default})"
        required = " Required." if flag in command.REQUIRED else ""
        lines.append(f"  --{flag:<18} {values[flag].help.splitlines()[0].rstrip(';')}{required}{default}")
    if "config" in values:
        lines.append(f"  --config             Configuration file (default: configs/{command.CONFIGURED}).")
        lines += ["", "fields, with defaults:"]
        lines.append(help_text())
    return "\n".join([*lines, "", EXIT_CODES])


def doc(name: str) -> str:
    """What a command does, in a line."""
    return (importlib.import_module(f"vit_nabirds.commands.{name}").__doc__ or "").splitlines()[0]


def _show(text: str) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)
    return 0


def _stop_at_once(*_: object) -> None:
    say(STOPPED)
    os._exit(EXIT_STOPPED)


def _stop_and_clean_up(*_: object) -> None:
    say(STOPPED)
    sys.exit(EXIT_STOPPED)
