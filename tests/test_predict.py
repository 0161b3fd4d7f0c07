"""A run and its export give the same answers, and what can go wrong on the way."""

import json
import logging
import os
import random
import re
import shutil

import numpy as np
import polars as pl
import pytest
from PIL import Image

from vit_nabirds import Classifier, cli
from vit_nabirds.commands import predict
from vit_nabirds.commands.export import export
from vit_nabirds.config import Config, default
from vit_nabirds.errors import UserError
from vit_nabirds.evaluation.kept import Kept
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


def test_views_are_those_of_the_evaluation(prepared, tmp_path):
    from tiny_config import get_config

    config = get_config()
    config.data.root, config.evaluate.views = str(prepared), "ten"
    assert train(Config.read(config), tmp_path, ProcessGroup()) == 0
    written = pl.read_parquet(tmp_path / "predictions.parquet").sort("path")
    files = [prepared / "cleaned_images" / path for path in written["path"]]
    for answer, probabilities in zip(Classifier(workdir=tmp_path)(files), written["probabilities"], strict=True):
        np.testing.assert_allclose(answer["probability"], probabilities, atol=1e-5)


def test_an_image_in_memory_and_one_that_lies_on_its_side(run, test_images, tmp_path):
    upright = Image.open(test_images[0][0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    straight, turned = Classifier(workdir=run)([upright, tmp_path / "turned.png"], topk=1)
    assert straight["file"] is None and upright.getpixel((0, 0)) is not None  # not closed
    assert straight["probability"] == pytest.approx(turned["probability"]) and straight["species"] == turned["species"]


def test_one_picture_of_any_sort_is_one_picture(run, test_images):
    classifier, file = Classifier(workdir=run), test_images[0][0]
    pixels = np.asarray(Image.open(file))
    [expected] = classifier([pixels], topk=1)
    for one in (file, str(file), file.read_bytes(), Image.open(file), pixels):
        [answer] = classifier(one, topk=1)
        assert answer["species"] == expected["species"] and answer["problem"] is None
        assert answer["file"] == (str(file) if isinstance(one, str | type(file)) else None)
    grey = pixels[..., 0]  # one picture too, not a list of rows
    assert [type(answer["species"]) for answer in classifier(grey)] == [list]
    assert len(list(classifier(np.stack([pixels, pixels])))) == len(list(classifier([pixels, file]))) == 2


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


@pytest.fixture
def zoo(test_images, tmp_path):
    """A folder of pictures under all sorts of names, and of files that are none."""
    folder, bird = tmp_path / "zoo", Image.open(test_images[0][0])
    folder.mkdir()
    kinds = {
        "a.JPG": "JPEG", "b.jfif": "JPEG", "c": "PNG", "d.download": "WEBP", "e.txt": "GIF", "f.avif": "AVIF",
        "g.TIF": "TIFF", "h.001": "TIFF", "i.x": "BMP", "j.x": "PPM", "k.x": "JPEG2000", "l.x": "AVIF", "m.jpg": "PNG",
    }  # fmt: skip
    for name, kind in kinds.items():
        bird.save(folder / name, kind)
    (folder / "n.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    (folder / "o").write_bytes(b"\0\0\0\x18ftypmif1" + bytes(20))
    (folder / "p.PNG").write_bytes(b"")
    (folder / "q.NEF").write_bytes((folder / "g.TIF").read_bytes())
    for name in ("r.txt", "s.TXT", "README", ".DS_Store", "._a.JPG", "t.svg"):
        (folder / name).write_text("Pfau, P5 and BMW")
    os.mkfifo(folder / "u.jpg")
    return folder


def test_pictures_count_by_content_and_all_else_by_kind(zoo, caplog):
    with caplog.at_level(logging.INFO):
        found = " ".join(file.name for file in predict.find_images(zoo))
    assert found == "a.JPG b.jfif c d.download e.txt f.avif g.TIF h.001 i.x j.x k.x l.x m.jpg n.heic o p.PNG"
    [line] = [line for line in caplog.messages if "left out" in line]
    assert line.startswith(f"{zoo}: 2 .txt, 1 ") and line.endswith(" left out")
    for kind in ("1 without a suffix", "1 .DS_Store", "1 ._*", "1 .svg", "1 .nef", "1 pipes or devices"):
        assert kind in line


def test_every_picture_is_named_or_has_a_problem(run, zoo, tmp_path):
    assert predict.predict(zoo, tmp_path / "out.csv", topk=1, workdir=run) == 0
    table = pl.read_csv(tmp_path / "out.csv")
    assert table["file"].to_list() == list(map(str, predict.find_images(zoo)))
    assert table.filter(pl.col("problem").is_null())["rank"].to_list() == [1] * 13
    problems = table.filter(pl.col("problem").is_not_null())
    assert [os.path.basename(file) for file in problems["file"]] == ["n.heic", "o", "p.PNG"]
    assert problems["species"].is_null().all()


def test_a_file_of_any_name_may_be_given_alone(run, zoo, tmp_path):
    assert predict.predict(zoo / "e.txt", tmp_path / "out.csv", topk=1, workdir=run) == 0
    assert predict.predict(zoo / "r.txt", tmp_path / "out.csv", topk=1, workdir=run) == 1
    assert pl.read_csv(tmp_path / "out.csv")["file"].to_list() == [str(zoo / "r.txt")]


def test_folders_behind_links_come_once(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (photos / "own", elsewhere / "below"):
        folder.mkdir(parents=True)
        (folder / "a.jpg").touch()
    for link, target in {
        photos / "0-own": photos / "own",
        photos / "up": photos,
        photos / "own" / "z": elsewhere,
        photos / "y": elsewhere,
        photos / "b": elsewhere / "below",
        elsewhere / "back": photos,
        photos / "self": photos / "self",
        photos / "c.jpg": photos / "own" / "a.jpg",
    }.items():
        link.symlink_to(target)
    found = [str(file.relative_to(photos)) for file in predict.find_images(photos)]
    assert found == ["b/a.jpg", "c.jpg", "own/a.jpg", "self"]


def test_a_folder_without_pictures_is_a_mistake(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").touch()
    with pytest.raises(UserError, match=re.escape("there is no picture in it (1 .txt)")):
        predict.find_images(tmp_path / "photos")


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


def test_a_stopped_call_goes_on_where_it_was(run, test_images, tmp_path, monkeypatch, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, file in enumerate(test_images[0]):
        shutil.copy(file, photos / f"={i:02d} <b>.jpg")
    (photos / "damaged.jpg").write_bytes(b"")
    assert predict.predict(photos, tmp_path / "whole.csv", workdir=run) == 0

    added, add = [], Kept.add

    def stop_at_the_tenth(kept, answer):
        if len(added) == 9:
            raise SystemExit(75)  # as a signal does
        added.append(add(kept, answer))

    arguments = dict(out=tmp_path / "birds.csv", html=tmp_path / "birds.html", workdir=run)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Kept, "add", stop_at_the_tenth)
        predict.predict(photos, **arguments)
    [kept] = tmp_path.glob(".birds*")
    kept.write_bytes(kept.read_bytes()[:-9])  # a crash has cut the last one short
    with caplog.at_level(logging.INFO):
        assert predict.predict(photos, **arguments) == 0
    assert "7 of 16 photographs were answered before: going on" in caplog.messages
    assert (tmp_path / "birds.csv").read_text() == (tmp_path / "whole.csv").read_text()
    page = (tmp_path / "birds.html").read_text()
    assert page.count("<article>") == 16 and page.count("data:image/jpeg") == 15 and "=03 &lt;b&gt;.jpg" in page
    names = {"photos", "birds.csv", "birds.html", "whole.csv"}
    assert {file.name for file in tmp_path.iterdir()} == names  # nothing half-written stays


def test_answers_to_another_question_are_not_used(run, test_images, tmp_path):
    question, files = {"topk": 5}, test_images[0][:3]
    for asked, photographs, expected in [
        (question, files, (2, 2)),  # the last may have more boxes
        ({"topk": 4}, files, (0, 0)),
        (question, files[1:], (0, 0)),
    ]:
        with Kept(tmp_path / "kept", question) as kept:
            kept.resume(files)
            for file in files:
                kept.add({"file": str(file)})
        with Kept(tmp_path / "kept", asked) as kept:
            assert kept.resume(photographs) == expected
        (tmp_path / "kept").unlink()


def test_the_answer_to_a_photograph_that_has_changed_is_not_used(tmp_path):
    files = [tmp_path / f"{number}.jpg" for number in range(3)]
    for file in files:
        file.write_bytes(b"one")
    with Kept(tmp_path / "kept", {}) as kept:
        kept.resume(files)
        for file in files:
            kept.add({"file": str(file)})
    files[0].write_bytes(b"another")
    with Kept(tmp_path / "kept", {}) as kept:
        assert kept.resume(files) == (0, 0)


def test_a_row_for_each_box(run, test_images, tmp_path, caplog):
    photos, boxes = tmp_path / "photos", tmp_path / "boxes.csv"
    photos.mkdir()
    bird = Image.open(test_images[0][0])
    for name in ("empty.png", "two.png"):
        scene = Image.new("RGB", (100, 80))
        scene.paste(bird, (7, 9))
        scene.save(photos / name)
    (photos / "damaged.png").write_bytes(b"")
    rows = [
        "two.png,7,9,16,16",
        "two.png,90,70,500,500",
        "two.png,300,0,5,5",
        "gone.png,1,1,5,5",
        "damaged.png,1,1,5,5",
    ]
    boxes.write_text("\n".join(["file,bb_x,bb_y,bb_width,bb_height", *rows]))
    with caplog.at_level(logging.INFO):
        assert predict.predict(photos, tmp_path / "out.parquet", topk=2, boxes=boxes, workdir=run) == 0
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert [os.path.basename(file) for file in table["file"]] == ["damaged.png", "empty.png"] + ["two.png"] * 5
    assert table["box"].to_list() == [None, None] + ["7 9 16 16"] * 2 + ["90 70 10 10"] * 2 + ["300 0 5 5"]
    assert table["rank"].to_list() == [None, None, 1, 2, 1, 2, None]
    assert table["problem"][1] == f"no box in {boxes}" and "outside its real 100x80" in table["problem"][6]
    [expected] = Classifier(workdir=run)(bird, topk=2)
    assert table["species"].to_list()[2:4] == expected["species"]
    assert table["probability"].to_list()[2:4] == pytest.approx(expected["probability"])
    assert f"{boxes}: 1 boxes are of files that are not among the photographs" in caplog.messages
    assert f"3 of 5 have no species: the column 'problem' of {tmp_path / 'out.parquet'} says why" in caplog.messages


@pytest.mark.parametrize("orientation, side", [(1, 60), (6, 60), (6, 1200)])
def test_a_box_shows_the_model_what_evaluation_showed_it(exported, tmp_path, orientation, side):
    from test_prepare import archive_of

    from vit_nabirds.data.boxes import BoxFinder
    from vit_nabirds.data.prepare import prepare
    from vit_nabirds.data.synthetic import PLUMAGES, draw_bird

    scene, exif = draw_bird(PLUMAGES[1], side * 2, side, random.Random(3))[0], Image.Exif()
    exif[0x0112] = orientation
    scene.save(tmp_path / "x.jpg", exif=exif, quality=90)
    photo = (tmp_path / "x.jpg").read_bytes()
    box = (side // 2, side // 8, side, side // 2)
    archive = archive_of(tmp_path / "archive", ("a.jpg", photo, box, 0), ("b.jpg", photo, box, 1))
    (archive / "sizes.txt").write_text(f"u-0 {side * 2} {side}\nu-1 {side * 2} {side}\n")
    prepare(archive, tmp_path / "prepared", train_size=16, test_size=16)
    photographs = sorted((archive / "images").rglob("*.jpg"))
    find = BoxFinder(archive / "bounding_boxes.txt", photographs, archive / "images")
    classifier = Classifier(model=exported)
    [(_, ours)] = classifier._read(photographs[0], find)
    [(_, evaluated)] = classifier._read(tmp_path / "prepared/cleaned_images/0295/a.jpg", None)
    [(_, whole)] = classifier._read(photographs[0], None)
    assert np.abs(ours - evaluated).mean() < 0.02 < 0.1 < np.abs(whole - evaluated).mean()


def test_whole_photographs_for_a_model_of_crops_are_worth_one_line(
    run, exported, hf_folder, test_images, caplog, tmp_path
):
    def warnings(find=None, **source):
        caplog.clear()
        classifier = Classifier(**source)
        for _ in range(2):
            list(classifier(test_images[0][:1], find=find))
        return sum("birds that were cut out" in message for message in caplog.messages)

    assert warnings(workdir=run) == warnings(model=exported) == 1
    assert warnings(model=exported, find=lambda *_: [None]) == warnings(model=hf_folder) == 0
    for crop, expected in {"none": 0, None: 1}.items():  # None: of an earlier version
        folder = shutil.copytree(exported, tmp_path / f"{crop}")
        fields = json.loads((folder / "preprocessor_config.json").read_text())
        assert fields.pop("vit_nabirds_crop") == "box"
        fields |= {"vit_nabirds_crop": crop} if crop else {}
        (folder / "preprocessor_config.json").write_text(json.dumps(fields))
        assert warnings(model=folder) == expected


def test_too_large_a_picture_is_a_problem(run, test_images, tmp_path):
    arguments = [f"--workdir={run}", f"--images={test_images[0][0]}", f"--out={tmp_path / 'out.csv'}"]
    assert cli.main(["predict", *arguments, "--max_pixels=255"]) == 1
    assert "16" in pl.read_csv(tmp_path / "out.csv")["problem"][0]
    assert cli.main(["predict", *arguments, "--max_pixels=256"]) == 0


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
        (dict(model="nowhere"), "takes a workdir, with or without a step and views, or a model"),
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
        (["--workdir=a", "--html=birds.htm2"], "--html=birds.htm2: its name must end in .html"),
        (["--workdir=a", "--model=b"], "predict needs --workdir or --model, not both"),
        (["--workdir=a", "--topk=0"], "--topk is 0"),
        (["--workdir=a", "--max_pixels=0"], "--max_pixels is 0"),
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
    assert "% top-1" in card and "credit the photographers" in card and '"learning_rate": 0.01' in card
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
