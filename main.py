"""Fine-tune Vision Transformers on photographs of birds.

usage: python main.py [train] [--config=FILE] [--workdir=DIR] [--config.x.y=value ...]
       python main.py prepare --archive=DIR --out=DIR [--pack | --metadata_only] [--train_size=269] [--test_size=224]
       python main.py evaluate --workdir=DIR [--step=N] [--data_root=DIR]
       python main.py predict (--workdir=DIR [--step=N] | --model=CHECKPOINT) --images=FILE_OR_FOLDER --out=FILE
       python main.py export --workdir=DIR [--step=N] --out=FOLDER
       python main.py verify --checkpoint=CHECKPOINT [--image=FILE ...] [--figure=FILE.png]

  train     fine-tune, or go on with the run in the workdir; alone, it trains configs/demo.py on birds it draws
  prepare   crop the photographs of an NABirds archive to their birds, ready for training
  evaluate  score a run's best checkpoint (or that of a step) on the test photographs
  predict   name the species in any photographs, into a .csv, .jsonl or .parquet file
  export    write a run's best checkpoint as a folder for Hugging Face's transformers
  verify    compare a Hugging Face checkpoint's logits in our model with those of transformers' own
  help      print this; `python main.py COMMAND --help` explains a command's flags

Exit codes: 0 finished; 75 stopped on request, all saved: run the same command again; 2 wrong usage; 1 other failure.
"""

import contextlib
import logging
import os
import signal
import sys
from types import ModuleType

from absl import app, flags
from absl import logging as absl_logging

from vit_nabirds.commands import flags_of as commands
from vit_nabirds.errors import UserError, message_of
from vit_nabirds.parallel.cpus import with_large_pages

FLAGS = flags.FLAGS
EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75


def parse(argv: list[str]) -> list[str]:
    """absl's parser, with one line for a mistake and exit code 2."""
    try:
        rest = FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}")
        if "config" in FLAGS:
            FLAGS.config.lock()  # raises what went wrong when the file was loaded
        return rest
    except Exception as error:  # a flag's, or whatever the user's configuration file may raise
        if "config" not in FLAGS or (isinstance(error, flags.Error) and "Traceback" not in str(error)):
            message = " ".join(str(error).split())
        else:
            from vit_nabirds.config.fields import explain

            message = explain(error, argv)
        if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # one of many tasks: all end, and one of them says why
            from vit_nabirds.parallel import launchers as cluster

            with contextlib.suppress(UserError):
                cluster.join()
        fail(message, EXIT_USAGE)


def run(_argv: list[str]) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("vit_nabirds")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax tells of every step it takes, and raises what it logs
    try:
        return commands.COMMANDS[command][1]()
    except Exception as error:
        if link := of_several():
            link.fail_with(error)
        if (message := message_of(error)) is None:
            raise
        fail(message, EXIT_FAILED)


def of_several() -> ModuleType | None:
    """`vit_nabirds.link` when there are other processes to tell; never imported for the sake of a message."""
    link = sys.modules.get("vit_nabirds.parallel.link")
    return None if link is None or link.is_alone() else link


def fail(message: str, code: int) -> None:
    if link := of_several():
        link.fail(message, code)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def stop_early(*_) -> None:
    """SIGTERM or Ctrl-C while nothing is under way that would not be done again."""
    os.write(2, b"stopped: run the same command again to go on\n")
    os._exit(EXIT_STOPPED)


if __name__ == "__main__":
    with_large_pages()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_early)
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    command = sys.argv.pop(1) if named else "train"
    if command == "help":
        print(__doc__.strip())
        sys.exit(0)
    if command not in commands.COMMANDS:
        fail(f"there is no command {command!r}: it is one of {', '.join(commands.COMMANDS)}, help", EXIT_USAGE)
    commands.COMMANDS[command][0]()
    if {"--help", "-help", "-h"} & set(sys.argv):
        print(f"{__doc__.strip()}\n{FLAGS.module_help(commands).replace(commands.__name__, command)}")
        sys.exit(0)
    app.run(run, flags_parser=parse)
