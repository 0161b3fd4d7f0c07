"""Fine-tune, or go on with the run in the workdir; by default it trains configs/demo.py on birds that it draws."""

import logging
import shlex
import sys
from pathlib import Path

from vit_nabirds.commands.invocation import program, relative, tool
from vit_nabirds.config import Config
from vit_nabirds.config.fields import flat
from vit_nabirds.errors import ConfigError

log = logging.getLogger("vit_nabirds")

REQUIRED = ()
FLAGS = {
    "workdir": (str, "Folder of the run (default: runs/ and the name of the configuration file)."),
    "accept_changes": (False, "Go on with the run although the configuration differs: more epochs, another recipe."),
    "from_step": (int, "With --accept_changes: go on from this checkpoint; later ones move to left/ in the workdir."),
}
PARALLEL = True
CONFIGURED = "demo.py"


def run(options, group) -> int:
    config = Config.read(options.config)
    if options.from_step is not None and not options.accept_changes:
        raise ConfigError("--from_step needs --accept_changes: what the run has learned after it is left aside.")
    changes = {"accept_changes": options.accept_changes, "from_step": options.from_step}
    return train_or_resume(config, workdir_of(options), group, experiment_of(options), **changes)


def train_or_resume(config: Config, workdir: Path, group, experiment: str, **changes) -> int:
    """Train with the group's processes, also from the checkpoint before a damaged one; returns the exit code."""
    from vit_nabirds.parallel.join import check_same_program

    check_same_program(group, flat(config.to_dict()))
    from vit_nabirds.runs.checkpoints import DamagedCheckpoint
    from vit_nabirds.training.train import FINISHED, train

    code = None
    while code is None:
        try:
            code = train(
                config, workdir, group, experiment=experiment, tensorboard=tool("tensorboard"), **changes
            )  # fmt: skip
        except DamagedCheckpoint as damage:  # of several processes all end, and the job is queued again
            if damage.folder.exists():
                raise
            log.warning("%s", damage)
    if code == FINISHED:
        log.info("%s", next_commands(workdir, config.data.synthetic))
    elif sys.stderr.isatty():  # under a launcher, the job's script starts it again
        log.info("to go on:  %s", shlex.join([*shlex.split(program()), *sys.argv[1:]]))
    return code


def workdir_of(options) -> Path:
    """--workdir, or a folder with the name of the configuration file."""
    return Path(options.workdir or f"runs/{experiment_of(options)}")


def experiment_of(options) -> str:
    """The name of the configuration file: that of a demo, where none is given."""
    return Path(options["config"].config_filename.split(":")[0]).stem


def next_commands(workdir: Path, on_drawn_birds: bool) -> str:
    this, folder = program(), shlex.quote(str(workdir))
    nabirds = relative(Path(__file__).parents[2] / "configs" / "nabirds_vit_b16.py")
    lines = [
        "what next:",
        f"  see the curves:  {tool('tensorboard')} --logdir={folder}",
        f"  make a page:     {this} report --workdir={folder}",
        f"  score it again:  {this} evaluate --workdir={folder}",
        f"  name birds:      {this} predict --workdir={folder} --images=FOLDER --out=birds.csv",
    ]
    if on_drawn_birds:
        lines += [
            f"  real birds:      {this} prepare --archive=NABIRDS_FOLDER --out=data/nabirds",
            f"                   {this} train --config={nabirds} --workdir=runs/nabirds_vit_b16",
        ]
    return "\n".join(lines)
