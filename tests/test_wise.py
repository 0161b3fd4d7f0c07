"""Runs that start from another run, and weights between pretrained and fine-tuned ones."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file
from tiny_config import get_config
from tiny_runs import FINISHED, train

from vit_nabirds.commands.evaluate import evaluate
from vit_nabirds.commands.export import export
from vit_nabirds.config import Config, default
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.evaluation.wise import AUTO, best_share, check_share
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.models.pretrained.positions import resize_positions
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.runs.loading import open_run
from vit_nabirds.runs.start import open_weights, starting_point


def config_from(pretrained: Path, prepared: Path):
    config = get_config()
    config.data.root = str(prepared)
    config.model = default().model
    config.model.pretrained = str(pretrained)
    config.epochs = 1.0
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Hugging Face checkpoint."""
    from checkpoints import save_tiny

    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base, prepared, tmp_path_factory) -> Path:
    """A run that started from it."""
    workdir = tmp_path_factory.mktemp("tuned")
    assert train(config_from(base, prepared), workdir) == FINISHED
    return workdir


@pytest.fixture(autouse=True)
def heard(caplog):
    """The program's log."""
    logging.getLogger("vit_nabirds").propagate = True
    caplog.set_level(logging.INFO, "vit_nabirds")


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[path], expected[path]) for path in expected)


def test_a_run_starts_from_the_selected_checkpoint_of_another(tuned, prepared):
    run = open_run(tuned)
    architecture, normalization, checkpoint = starting_point(Config.read(config_from(tuned, prepared)), ProcessGroup())
    assert architecture == run.metadata.architecture and normalization.mean == (0.1, 0.2, 0.3)
    species = run.metadata.species
    for _ in range(2):  # what is taken is read again
        assert same(checkpoint.load(architecture, species), run.params)
    turned = checkpoint.load(architecture, species[::-1])
    assert np.array_equal(turned["classifier/kernel"], run.params["classifier/kernel"][:, ::-1])
    backbone = {path for path in run.params if not path.startswith("classifier/")}
    assert checkpoint.load(architecture, ["others"]).keys() == backbone


def test_the_positions_of_a_run_are_resized(tuned, prepared):
    config = config_from(tuned, prepared)
    config.model.image_size = 32
    architecture, _, checkpoint = starting_point(Config.read(config), ProcessGroup())
    positions = checkpoint.load(architecture, [])["position_embeddings"]
    expected = resize_positions(np.asarray(open_run(tuned).params["position_embeddings"]), 4, antialias=False)
    np.testing.assert_array_equal(positions, expected)
    config.model.image_size = 20
    with pytest.raises(ConfigError, match="choose a multiple of patch_size, which is 8"):
        starting_point(Config.read(config), ProcessGroup())


def test_a_training_goes_on_from_another_run(tuned, prepared, tmp_path, caplog):
    config = config_from(tuned, prepared)
    config.optimizer.learning_rate, config.optimizer.weight_decay = 1e-30, 0.0
    assert train(config, tmp_path / "run") == FINISHED
    assert same(open_run(tmp_path / "run").params, open_run(tuned).params)
    assert f"weights of {tuned}, step {open_run(tuned).step}" in caplog.text


def test_hugging_face_folders_and_half_a_run_are_told_apart(base, tuned, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "checkpoints").mkdir()
    assert open_weights(str(folder), ProcessGroup()).labels == [f"LABEL_{i}" for i in range(9)]
    half = shutil.copytree(tuned, tmp_path / "half")
    shutil.rmtree(half / "checkpoints")
    (half / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint yet"):
        open_weights(str(half), ProcessGroup())
    with pytest.raises(UserError, match="there is no folder"):
        open_weights(str(tmp_path / "gone"), ProcessGroup())


@pytest.mark.parametrize("share", ["0", "0.25", "1"])
def test_an_export_between_pretrained_and_tuned_weights(base, tuned, tmp_path, share):
    export(tuned, tmp_path / "out", wise=share)
    exported = open_checkpoint(str(tmp_path / "out"))
    found, own = exported.load(exported.architecture, exported.labels), open_run(tuned).params
    pretrained, weight = open_checkpoint(str(base)).load(exported.architecture, []), float(share)
    for path in own:
        mixed = own[path] if path.startswith("classifier/") else (1 - weight) * pretrained[path] + weight * own[path]
        np.testing.assert_allclose(found[path], mixed, rtol=1e-6, atol=1e-7)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"are {share} of the fine-tuned" in card and ("% top-1" in card) == (share == "1")
    assert (f"not yet; `evaluate --wise={share}` does" in card) == (share != "1") and "average" not in card


def test_evaluate_scores_a_share_and_all_of_the_runs_own_is_the_run(tuned, capsys):
    printed = []
    for share in (None, "1", "0.5"):
        assert evaluate(tuned, wise=share) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[1] == printed[0] | {"wise": 1.0}
    assert printed[2]["wise"] == 0.5 and printed[2]["test"]["loss"] != printed[0]["test"]["loss"]


def test_auto_takes_the_share_with_the_best_figure_on_the_validation_photographs(tuned, tmp_path, capsys, caplog):
    assert evaluate(tuned, wise="auto") == 0
    auto = json.loads(capsys.readouterr().out)
    rows = re.findall(
        r"share (\d\.\d) of .*: accuracy ([\d.]+), mean_class_accuracy ([\d.]+), loss ([\d.]+)", caplog.text
    )
    rows = [tuple(map(float, row)) for row in rows]
    assert [row[0] for row in rows] == [x / 10 for x in range(10, -1, -1)]
    assert auto["wise"] == max(rows, key=lambda row: (row[1], -row[3]))[0]
    figures = open_run(tuned).figures
    assert rows[0][1:] == tuple(round(figures[f"val/{x}"], 4) for x in ("accuracy", "mean_class_accuracy", "loss"))
    assert evaluate(tuned, wise=str(auto["wise"])) == 0
    assert json.loads(capsys.readouterr().out) == auto
    export(tuned, tmp_path / "out", wise="auto")
    assert f"are {auto['wise']:g} of the fine-tuned" in (tmp_path / "out" / "README.md").read_text()


def test_auto_on_data_without_validation_photographs_says_what_it_needs(tuned, prepared, tmp_path):
    few = shutil.copytree(prepared, tmp_path / "few")
    table = pl.read_parquet(few / "metadata.parquet")
    first = table.filter("is_training_img").group_by("class_id").head(1)
    pl.concat([first.select(table.columns), table.filter(~pl.col("is_training_img"))]).write_parquet(
        few / "metadata.parquet"
    )
    with pytest.raises(ConfigError, match="--wise=auto chooses by validation photographs, but .* Or give a number"):
        evaluate(tuned, root=str(few), wise=AUTO)


def test_evaluate_looks_at_other_views_on_request(tuned, capsys):
    found = {}
    for views in (None, "one", "flip"):
        assert evaluate(tuned, views=views) == 0
        found[views] = json.loads(capsys.readouterr().out)["test"]
    assert found[None] == found["one"] and found["one"]["loss"] != found["flip"]["loss"]
    with pytest.raises(ConfigError, match="--views is 'two'"):
        evaluate(tuned, views="two")


def test_a_run_goes_on_from_its_checkpoint_whatever_weights_are_named(tuned, prepared, tmp_path, caplog):
    assert train(config_from(tmp_path / "nothing", prepared), shutil.copytree(tuned, tmp_path / "run")) == FINISHED
    assert "config.model.pretrained is not read: the run goes on from its checkpoint, and began with" in caplog.text


def test_of_equal_shares_the_smallest_loss_counts_then_the_largest_share():
    found = {
        share: {"val/accuracy": a, "val/loss": x} for share, a, x in ((0.0, 0.5, 1.0), (0.5, 0.9, 0.3), (1.0, 0.9, 0.4))
    }
    assert best_share(found, "val/accuracy") == 0.5 and best_share(found, "val/loss") == 0.5
    found[1.0]["val/loss"] = 0.3
    assert best_share(found, "val/accuracy") == 1.0


def test_shares_that_cannot_be(tuned, undisturbed, tmp_path, base):
    for text in ("1.5", "-0.1", "half", "nan", ""):
        with pytest.raises(ConfigError, match=f"--wise is '{text}': give a number from 0 .* or auto"):
            evaluate(tuned, wise=text)
    with pytest.raises(ConfigError, match="these were random"):
        export(undisturbed, tmp_path / "out", wise="0.5")
    run = open_run(tuned)
    config = run.metadata.config | {"data": run.metadata.config["data"] | {"validation": 0.0}}
    with pytest.raises(ConfigError, match="config.data.validation=0: give a number"):
        check_share(AUTO, dataclasses.replace(run, metadata=dataclasses.replace(run.metadata, config=config)))
    config = run.metadata.config | {"trainable": "classifier"}
    with pytest.raises(ConfigError, match="this one trained the classifier alone"):
        check_share(0.5, dataclasses.replace(run, metadata=dataclasses.replace(run.metadata, config=config)))
    base.rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(UserError, match="there is no folder"):
            export(tuned, tmp_path / "out", wise="0.5")
        shutil.copytree(tmp_path / "elsewhere", base)
        tensors = load_file(base / "model.safetensors")
        tensors["vit.encoder.layer.1.output.dense.bias"][3] += 1e-3
        save_file(tensors, base / "model.safetensors")
        with pytest.raises(UserError, match=f"--wise needs .* but {base} holds others now"):
            export(tuned, tmp_path / "out", wise="0.5")
    finally:
        shutil.rmtree(base, ignore_errors=True)
        (tmp_path / "elsewhere").rename(base)
    assert not (tmp_path / "out").exists()
