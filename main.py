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
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

from absl import app, flags
from absl import logging as absl_logging

from vit_nabirds.cpus import with_large_pages
from vit_nabirds.errors import UserError, message_of

FLAGS = flags.FLAGS
EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75


def cluster_flags() -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 (default: from Slurm; else this one is alone).")
    flags.DEFINE_integer("num_processes", None, "Number of processes (default: from Slurm).", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "This process's number, from 0 on (default: from Slurm).", lower_bound=0)
    flags.DEFINE_integer("start_timeout", 45, "Seconds for all processes to meet.", lower_bound=5)


def join_processes() -> None:
    from vit_nabirds import cluster, processes

    cluster.join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.start_timeout)
    if not processes.is_writer():
        logging.getLogger("vit_nabirds").setLevel(logging.ERROR)
    processes.check_same_program(FLAGS.config.to_dict() if "config" in FLAGS else {})


def train_flags() -> None:
    from ml_collections import config_flags

    cluster_flags()
    if not any(re.fullmatch("--?config(=.*)?", argument) for argument in sys.argv):
        sys.argv.insert(1, f"--config={Path(__file__).parent / 'configs' / 'demo.py'}")
    config_flags.DEFINE_config_file("config", None, "Configuration file; --config.x.y=value changes a field.")
    flags.DEFINE_string("workdir", None, "Folder of the run (default: runs/ and the name of the configuration file).")


def train() -> int:
    join_processes()
    from vit_nabirds.train import train

    name = Path(FLAGS["config"].config_filename.split(":")[0]).stem
    return train(FLAGS.config, Path(FLAGS.workdir or f"runs/{name}"))


def prepare_flags() -> None:
    flags.DEFINE_string("archive", None, "Folder of the unpacked NABirds archive.", required=True)
    flags.DEFINE_string("out", None, "Folder to write metadata.parquet and cleaned_images/ to.", required=True)
    flags.DEFINE_boolean("metadata_only", False, "Write metadata.parquet alone.")
    flags.DEFINE_boolean("pack", False, "Write packed/ too: all images of a split in one file, read without decoding.")
    flags.DEFINE_integer("train_size", 269, "Side of a training image in pixels; training crops at random from it.")
    flags.DEFINE_integer("test_size", 224, "Side of a test image in pixels: the model's image size.")
    flags.DEFINE_float("margin", 0.2, "Margin around a training bird, as a share of its bounding box on each side.")


def prepare() -> int:
    from vit_nabirds.prepare import prepare

    geometry = dict(train_size=FLAGS.train_size, test_size=FLAGS.test_size, margin=FLAGS.margin)
    prepare(FLAGS.archive, FLAGS.out, metadata_only=FLAGS.metadata_only, pack=FLAGS.pack, **geometry)
    return 0


def evaluate_flags() -> None:
    cluster_flags()
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer("step", None, "Step of the checkpoint (default: the best).")
    flags.DEFINE_string("data_root", None, "Prepared folder (default: the one that the run was trained on).")


def evaluate() -> int:
    join_processes()
    from vit_nabirds.evaluate import evaluate_run

    return evaluate_run(Path(FLAGS.workdir), FLAGS.step, FLAGS.data_root)


def predict_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run whose best checkpoint is to be used.")
    flags.DEFINE_integer("step", None, "Step of the run's checkpoint (default: the best).")
    flags.DEFINE_string(
        "model", None, "Instead of a run: an exported folder, or another checkpoint's folder or Hub id."
    )
    flags.DEFINE_string("images", None, "Photograph, or folder of photographs.", required=True)
    flags.DEFINE_string("out", None, "File to write, .csv, .jsonl or .parquet: a row for each rank.", required=True)
    flags.DEFINE_integer("topk", 5, "Species to name for each photograph.", lower_bound=1)
    flags.mark_flags_as_mutual_exclusive(["workdir", "model"], required=True)


def predict() -> int:
    from vit_nabirds.predict import predict

    source = dict(workdir=FLAGS.workdir, step=FLAGS.step, model=FLAGS.model)
    return predict(Path(FLAGS.images), Path(FLAGS.out), FLAGS.topk, **source)


def export_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer("step", None, "Step of the checkpoint (default: the best).")
    flags.DEFINE_string("out", None, "Folder to write; it must not exist.", required=True)


def export() -> int:
    from vit_nabirds.export import export

    export(Path(FLAGS.workdir), Path(FLAGS.out), FLAGS.step)
    return 0


def verify_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Folder or Hub id of a checkpoint.", required=True)
    flags.DEFINE_multi_string("image", [], "Picture to compare on; may be given several times (default: a drawn bird).")
    flags.DEFINE_string("figure", None, "File for the pictures with both answers, side by side.")
    flags.DEFINE_float("tolerance", 1e-4, "Largest difference of logits that counts as the same.", lower_bound=0)


def verify() -> int:
    from vit_nabirds.verify import verify

    return verify(FLAGS.checkpoint, FLAGS.image, FLAGS.figure and Path(FLAGS.figure), FLAGS.tolerance)


COMMANDS = {
    "train": (train_flags, train),
    "prepare": (prepare_flags, prepare),
    "evaluate": (evaluate_flags, evaluate),
    "predict": (predict_flags, predict),
    "export": (export_flags, export),
    "verify": (verify_flags, verify),
}


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
            from vit_nabirds.config import explain

            message = explain(error, argv)
        if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # one of many tasks: all end, and one of them says why
            from vit_nabirds import cluster

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
        return COMMANDS[command][1]()
    except Exception as error:
        if link := of_several():
            link.fail_with(error)
        if (message := message_of(error)) is None:
            raise
        fail(message, EXIT_FAILED)


def of_several() -> ModuleType | None:
    """`vit_nabirds.link` when there are other processes to tell; never imported for the sake of a message."""
    link = sys.modules.get("vit_nabirds.link")
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
    if command not in COMMANDS:
        fail(f"there is no command {command!r}: it is one of {', '.join(COMMANDS)}, help", EXIT_USAGE)
    COMMANDS[command][0]()
    if {"--help", "-help", "-h"} & set(sys.argv):
        print(f"{__doc__.strip()}\n{FLAGS.main_module_help()}")
        sys.exit(0)
    app.run(run, flags_parser=parse)
