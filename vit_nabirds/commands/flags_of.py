"""What `main.py` can do: of each command its flags and its function, which imports what it needs when it is called."""

import logging
import re
import sys
from pathlib import Path

from absl import flags

FLAGS = flags.FLAGS


def cluster_flags() -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 (default: from Slurm; else this one is alone).")
    flags.DEFINE_integer("num_processes", None, "Number of processes (default: from Slurm).", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "This process's number, from 0 on (default: from Slurm).", lower_bound=0)
    flags.DEFINE_integer("start_timeout", 45, "Seconds for all processes to meet.", lower_bound=5)


def join_processes() -> None:
    from vit_nabirds.parallel import launchers as cluster
    from vit_nabirds.parallel import processes

    cluster.join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, FLAGS.start_timeout)
    if not processes.is_writer():
        logging.getLogger("vit_nabirds").setLevel(logging.ERROR)
    processes.check_same_program(FLAGS.config.to_dict() if "config" in FLAGS else {})


def train_flags() -> None:
    from ml_collections import config_flags

    cluster_flags()
    if not any(re.fullmatch("--?config(=.*)?", argument) for argument in sys.argv):
        sys.argv.insert(1, f"--config={Path(__file__).parent.parent / 'configs' / 'demo.py'}")
    config_flags.DEFINE_config_file("config", None, "Configuration file; --config.x.y=value changes a field.")
    flags.DEFINE_string("workdir", None, "Folder of the run (default: runs/ and the name of the configuration file).")


def train() -> int:
    join_processes()
    from vit_nabirds.training.loop import train

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
    from vit_nabirds.data.prepare import prepare

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
    from vit_nabirds.evaluation.scoring import evaluate_run

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
    from vit_nabirds.commands.predict import predict

    source = dict(workdir=FLAGS.workdir, step=FLAGS.step, model=FLAGS.model)
    return predict(Path(FLAGS.images), Path(FLAGS.out), FLAGS.topk, **source)


def export_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer("step", None, "Step of the checkpoint (default: the best).")
    flags.DEFINE_string("out", None, "Folder to write; it must not exist.", required=True)


def export() -> int:
    from vit_nabirds.commands.export import export

    export(Path(FLAGS.workdir), Path(FLAGS.out), FLAGS.step)
    return 0


def verify_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Folder or Hub id of a checkpoint.", required=True)
    flags.DEFINE_multi_string("image", [], "Picture to compare on; may be given several times (default: a drawn bird).")
    flags.DEFINE_string("figure", None, "File for the pictures with both answers, side by side.")
    flags.DEFINE_float("tolerance", 1e-4, "Largest difference of logits that counts as the same.", lower_bound=0)


def verify() -> int:
    from vit_nabirds.commands.verify import verify

    return verify(FLAGS.checkpoint, FLAGS.image, FLAGS.figure and Path(FLAGS.figure), FLAGS.tolerance)


COMMANDS = {
    "train": (train_flags, train),
    "prepare": (prepare_flags, prepare),
    "evaluate": (evaluate_flags, evaluate),
    "predict": (predict_flags, predict),
    "export": (export_flags, export),
    "verify": (verify_flags, verify),
}
