"""Make one HTML page of a run, or of two side by side: curves, figures, species, mistakes with their photographs."""

import logging
import os
from pathlib import Path

from vit_nabirds.commands.files import check_file
from vit_nabirds.errors import UserError

log = logging.getLogger("vit_nabirds")

REQUIRED = ("workdir",)
FLAGS = {
    "workdir": (str, "Folder of the run, finished or not."),
    "out": (str, "Page to write (default: report.html in the workdir; with --compare comparison.html)."),
    "compare": (str, "Folder of another run, to be compared with it."),
    "data_root": (str, "Prepared folder with the photographs, if it has moved since the training."),
}
PARALLEL = False
CONFIGURED = ""


def run(options, group) -> int:
    if options.out:
        check_file("out", Path(options.out), (".html",))
    default = Path(options.workdir) / ("comparison.html" if options.compare else "report.html")
    other, root = (value and Path(value) for value in (options.compare, options.data_root))
    if not options.out and not os.access(options.workdir, os.W_OK) and Path(options.workdir).is_dir():
        raise UserError(f"{options.workdir} cannot be written to: give the page a place, --out=FILE.html.")
    report(Path(options.workdir), Path(options.out or default), other, root)
    return 0


def report(workdir: Path, out: Path, other: Path | None = None, data_root: Path | None = None) -> None:
    """Write the page of a run, or of it and another one. UserError if there is no run, or a file of it is damaged."""
    from vit_nabirds.runs.workdir import read_workdir

    runs = [read_workdir(folder) for folder in [workdir, *([other] if other else [])]]
    from vit_nabirds.evaluation.album import Album
    from vit_nabirds.evaluation.pages import write_page
    from vit_nabirds.evaluation.report import page_of
    from vit_nabirds.evaluation.side_by_side import comparison_of

    albums = (Album(data_root or Path(run.config.data.root), run.config.data.label) for run in runs)
    album = min(albums, key=lambda album: bool(album.problem))  # the other folder where the first is gone
    if other:
        write_page(out, "comparison.html", **comparison_of(*runs, album))
    else:
        write_page(out, "report.html", **page_of(*runs, album))
    log.info("%s: %.1f MB, open it in a browser", out, out.stat().st_size / 1e6)
