"""Which files count as pictures, for every command that reads some."""

import os
import shutil

import polars as pl
import pytest

from vit_nabirds.data.synthetic import draw_archive

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path):
    """The environment of a machine that has Ghostscript, and the file that says that it was started."""
    program, started = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    return os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}, started


def test_predict_leaves_postscript_alone_whatever_its_name(main, hf_folder, tmp_path, ghostscript):
    environment, started = ghostscript
    (tmp_path / "bird.jpg").write_bytes(POSTSCRIPT)
    done = main("predict", f"--model={hf_folder}", "--images=bird.jpg", "--out=birds.csv", env=environment)
    assert done.returncode == 1 and not started.exists()
    assert "not a picture in one of the formats AVIF, BMP" in pl.read_csv(tmp_path / "birds.csv")["problem"][0]


def test_prepare_and_train_leave_postscript_alone(main, prepared, tmp_path, ghostscript):
    environment, started = ghostscript
    draw_archive(tmp_path / "archive", species=2, train=2, test=1, size=(40, 60))
    next((tmp_path / "archive" / "images").rglob("*.jpg")).write_bytes(POSTSCRIPT)
    done = main("prepare", "--archive=archive", "--out=out", env=environment)
    assert done.returncode == 1 and "not a picture in one of the formats" in done.stderr
    birds = shutil.copytree(prepared, tmp_path / "birds")
    next((birds / "cleaned_images").rglob("*.jpg")).write_bytes(POSTSCRIPT)
    done = main(*main.tiny, f"--config.data.root={birds}", "--workdir=run", env=environment)
    assert done.returncode == 1 and "not a picture in one of the formats" in done.stderr
    assert not started.exists()
