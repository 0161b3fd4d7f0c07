"""A run and its export give the same answers, and what can go wrong on the way."""

import json
import os

import numpy as np
import polars as pl
import pytest
from PIL import Image

from vit_nabirds import Classifier, cli
from vit_nabirds.commands import predict
from vit_nabirds.commands.export import export
from vit_nabirds.config import Config, default
from vit_nabirds.errors import UserError
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.runs.loading import open_run
from vit_nabirds.training.train import train


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A workdir with 20 tiny steps."""
    from tiny_config import get_config

    workdir, tiny = tmp_path_factory.mktemp("run"), get_config()
    tiny.data.root = str(prepared)
    assert train(Config.read(tiny), workdir, ProcessGroup()) == 0
    return workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "birds"
    export(run, folder)
    return folder


@pytest.fixture(scope="module")
def test_images(prepared):
    table = pl.read_parquet(prepared / "metadata.parquet").filter(pl.col("is_training_img").cast(pl.Int8) == 0)
    return [prepared / "cleaned_images" / path for path in table["path"]], table["species_name"].to_list()


def test_the_classifier_is_right_as_often_as_the_evaluation_says(run, exported, test_images):
    files, species = test_images
    answers = list(Classifier(workdir=run)(files, topk=2))
    accuracy = json.loads((run / "results.json").read_text())["test"]["accuracy"]
    right = [answer["species"][0] == name for answer, name in zip(answers, species, strict=True)]
    assert 0 < sum(right) == round(accuracy * len(files))
    of_export = list(Classifier(model=exported)(files, topk=2))
    for ours, theirs in zip(answers, of_export, strict=True):
        assert ours["species"] == theirs["species"] and len(ours["species"]) == 2
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


def test_an_image_in_memory_and_one_that_lies_on_its_side(run, test_images, tmp_path):
    upright = Image.open(test_images[0][0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    straight, turned = Classifier(workdir=run)([upright, tmp_path / "turned.png"], topk=1)
    assert straight["file"] is None and upright.getpixel((0, 0)) is not None  # not closed
    assert straight["probability"] == pytest.approx(turned["probability"]) and straight["species"] == turned["species"]
    [array] = Classifier(workdir=run)([np.asarray(upright)], topk=1)
    [one] = Classifier(workdir=run)(str(test_images[0][0]), topk=1)  # a path alone
    assert array["species"] == one["species"] == straight["species"] and one["file"] == str(test_images[0][0])


@pytest.fixture
def folder(test_images, tmp_path):
    """Three images in a folder and its subfolder, one of them damaged, a dangling link and a text."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name, file in zip(("a, b.jpg", "more/c.JPG"), test_images[0], strict=False):
        (folder / name).write_bytes(file.read_bytes())
    (folder / "damaged.jpg").write_bytes(test_images[0][0].read_bytes()[:300])
    (folder / "notes.txt").write_text("two of them")
    os.symlink("nowhere", os.fsencode(folder) + b"/z\xff.png")  # dangling, with a name that is not UTF-8
    return folder


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_row_for_each_rank_and_one_for_what_cannot_be_read(run, folder, tmp_path, suffix):
    out = tmp_path / f"birds.{suffix}"
    assert predict.predict(folder, out, topk=3, workdir=run) == 0
    read = {"csv": pl.read_csv, "jsonl": pl.read_ndjson, "parquet": pl.read_parquet}[suffix]
    table = read(out)
    assert table.columns == list(predict.COLUMNS)
    assert table["file"].to_list() == [str(folder / "a, b.jpg")] * 3 + [str(folder / "damaged.jpg")] + [
        str(folder / "more" / "c.JPG")
    ] * 3 + [str(folder / "z\ufffd.png")]
    assert table["rank"].to_list() == [1, 2, 3, None, 1, 2, 3, None]
    assert "runcated" in table["problem"][3] and "No such file" in table["problem"][7]
    assert sorted(tmp_path.iterdir()) == sorted([out, folder])  # nothing half-written stays


def test_no_readable_photograph_is_a_failure(run, folder, tmp_path):
    assert predict.predict(folder / "damaged.jpg", tmp_path / "out.csv", workdir=run) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(images="nowhere"), "no such file or folder"),
        (dict(out="birds.txt"), "must end in .csv, .jsonl or .parquet"),
        (dict(out="nowhere/birds.csv"), "there is no folder"),
        (dict(workdir="nowhere"), "holds no run"),
        (dict(out="images.csv"), "is a folder: give the name of a file"),
        (dict(model="nowhere"), "takes a workdir, with or without a step, or a model"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.csv").mkdir()
    arguments = dict(images=folder, out="birds.csv", workdir=run) | arguments
    paths = {name: type(folder)(value) for name, value in arguments.items()}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        predict.predict(paths.pop("images"), paths.pop("out"), **paths)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "predict needs --workdir or --model, not both"),
        (["--workdir=a", "--model=b"], "predict needs --workdir or --model, not both"),
        (["--workdir=a", "--topk=0"], "--topk is 0"),
    ],
)
def test_flags_that_do_not_fit_are_wrong_usage(flags, message, capfd):
    assert cli.main(["predict", "--images=x", "--out=birds.csv", *flags]) == 2
    assert message in capfd.readouterr().err


def test_a_checkpoint_without_classifier_names_nothing(hf_folder):
    edited = json.loads((hf_folder / "config.json").read_text())
    from safetensors.numpy import load_file, save_file

    tensors = load_file(hf_folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, hf_folder / "model.safetensors")
    (hf_folder / "config.json").write_text(json.dumps(edited))
    with pytest.raises(UserError, match="has no classifier: train one"):
        Classifier(model=hf_folder)


def test_an_export_says_what_it_is_and_overwrites_nothing(run, exported):
    card = (exported / "README.md").read_text()
    assert "% top-1" in card and "credit the\nphotographers" in card and '"learning_rate": 0.01' in card
    with pytest.raises(UserError, match="exists already"):
        export(run, exported)
    assert sorted(file.name for file in exported.parent.iterdir()) == ["birds"]


def test_training_goes_on_from_an_export_with_its_head(exported, tiny_config, tmp_path):
    tiny_config.model = default().model
    tiny_config.model.pretrained = str(exported)
    tiny_config.optimizer.learning_rate = 1e-9
    tiny_config.epochs = 1.0
    assert train(Config.read(tiny_config), tmp_path / "more", ProcessGroup()) == 0
    checkpoint = open_checkpoint(str(exported))
    before, after = checkpoint.load(checkpoint.architecture, checkpoint.labels), open_run(tmp_path / "more").params
    for path, value in before.items():
        np.testing.assert_allclose(after[path], value, atol=1e-5)


@pytest.mark.parametrize("size, pool, width", [(24, None, 16), (16, "cls+mean", 32)])
def test_another_resolution_and_another_head(hf_folder, tiny_config, prepared, tmp_path, size, pool, width):
    from vit_nabirds.data.prepare import prepare

    prepare(prepared.parent / "archive", tmp_path / "birds", train_size=28, test_size=size)
    tiny_config.data.root = str(tmp_path / "birds")
    tiny_config.model = default().model
    tiny_config.model.update(pretrained=str(hf_folder), image_size=size, pool=pool)
    tiny_config.epochs = 1.0
    assert train(Config.read(tiny_config), tmp_path / "run", ProcessGroup()) == 0
    params = open_run(tmp_path / "run").params
    assert params["position_embeddings"].shape == (1, 1 + (size // 8) ** 2, 16)
    assert params["classifier/kernel"].shape == (width, 4)
    assert np.isfinite(params["classifier/kernel"]).all()
