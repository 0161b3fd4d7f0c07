"""The probe: features that are computed once, the sweep on them, and the run that it leaves."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_config import get_config
from tiny_runs import FINISHED, metadata_of, prepared_run, read_evaluations, steps_of, train

from vit_nabirds.commands.evaluate import evaluate
from vit_nabirds.commands.probe import numbers, to_try
from vit_nabirds.config import Config
from vit_nabirds.data.crops import fit
from vit_nabirds.data.images import open_images
from vit_nabirds.data.table import BIRD
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel.group import ProcessGroup
from vit_nabirds.parallel.preemption import StopRequest
from vit_nabirds.runs.loading import open_run
from vit_nabirds.training.features import Features, features_of
from vit_nabirds.training.probe import probe, select
from vit_nabirds.training.sweep import Candidate, figures_on, sweep

RATES, DECAYS = [0.01, 0.1, 1.0], [0.0, 0.1]


def probe_config(prepared: Path):
    """Nesterov's momentum on batches of 8 of 40 photographs: 10 steps."""
    config = get_config()
    config.data.root = str(prepared)
    config.trainable = "classifier"
    config.epochs = 2.0
    config.optimizer.name = "sgd"
    config.optimizer.schedule = "linear"
    return config


def run_probe(config, workdir: Path, rates=RATES, decays=DECAYS) -> int:
    return probe(Config.read(config), workdir, ProcessGroup(), rates, decays)


@pytest.fixture(scope="module")
def probed(prepared, tmp_path_factory) -> Path:
    """The workdir of a probe. Copy it to change it."""
    workdir = tmp_path_factory.mktemp("probed")
    assert run_probe(probe_config(prepared), workdir) == FINISHED
    return workdir


@pytest.fixture
def run(prepared, tmp_path):
    """A probe before it starts."""
    return prepared_run(probe_config(prepared), tmp_path / "run")


@pytest.fixture(autouse=True)
def heard(caplog):
    """The program's log."""
    logging.getLogger("vit_nabirds").propagate = True
    caplog.set_level(logging.INFO, "vit_nabirds")


def test_a_probe_leaves_a_run_that_evaluate_reads(probed, capsys):
    results = json.loads((probed / "results.json").read_text())
    assert evaluate(probed) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"step": 10, "selected_by": "val/accuracy", "test": results["test"]}
    assert (probed / "predictions.parquet").exists() and steps_of(probed) == [10]
    assert results["selected"]["value"] == read_evaluations(probed / "metrics.jsonl")[10]["val/accuracy"]


def test_the_best_of_the_sweep_is_the_run(probed):
    tried = json.loads((probed / "results.json").read_text())["sweep"]
    assert [(x["learning_rate"], x["weight_decay"]) for x in tried] == [(r, d) for d in DECAYS for r in RATES]
    best = max(tried, key=lambda x: (x["val/accuracy"], -x["val/loss"]))
    optimizer = metadata_of(probed).config["optimizer"]
    assert optimizer["learning_rate"] == best["learning_rate"] and optimizer["weight_decay"] == best["weight_decay"]
    assert json.loads((probed / "config.json").read_text())["optimizer"] == optimizer
    evaluation = read_evaluations(probed / "metrics.jsonl")[10]
    assert {name: best[name] for name in best if name.startswith("val/")}.items() <= evaluation.items()


def test_the_frozen_part_of_the_model_stays(probed, run):
    first, params = run.first_state({}).params, open_run(probed).params
    changed = {path for path in first if not np.array_equal(first[path], params[path])}
    assert changed == {"classifier/kernel", "classifier/bias"}


def test_a_validation_figure_is_that_of_the_whole_model(probed, run):
    loaded = open_run(probed)
    split = run.validation_split
    pixels = np.zeros((len(split), 16, 16, 3), np.uint8)
    for number in range(len(split)):
        split.read(number, pixels[number])
    logits = np.asarray(loaded.model.logits(loaded.params, pixels / np.float32(127.5) - 1))
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(split)), split.labels]
    assert loaded.figures["val/accuracy"] == np.mean(logits.argmax(-1) == split.labels)
    assert loaded.figures["val/loss"] == pytest.approx(losses.mean(), rel=1e-4)


def test_features_are_of_the_birds_cut_out_of_the_training_images(run, prepared, tmp_path):
    params, stop = run.first_state({}).params, StopRequest()
    found = features_of(run, params, "train", tmp_path / "features", stop)
    rows = run.table.with_row_index("row").filter(split="train")
    images = open_images(prepared, run.table, True)
    image, pixels = np.empty((20, 20, 3), np.uint8), []
    for path, x, y, width, height in rows.select("path", *BIRD).iter_rows():
        images.read(list(images.paths).index(path), image)
        pixels.append(fit(image[y : y + height, x : x + width], 16))
    expected = run.model.bind(params).features(np.stack(pixels) / np.float32(127.5) - 1)
    assert found.labels.tolist() == rows["label"].to_list() and len(found.labels) == 40
    np.testing.assert_allclose(found.values, expected, atol=1e-5)


def test_features_are_computed_once_and_again_if_anything_is_wrong(run, tmp_path, caplog):
    params, stop, folder = run.first_state({}).params, StopRequest(), tmp_path / "features"

    def computes(params) -> bool:
        caplog.clear()
        found = features_of(run, params, "validation", folder, stop)
        np.testing.assert_array_equal(found.labels, run.validation_split.labels)
        return "computing the features" in caplog.text

    assert computes(params) and not computes(params)
    assert not computes(params | {"classifier/bias": params["classifier/bias"] + 1})
    assert computes(params | {"cls_token": params["cls_token"] + 1}) and "other photographs, weights" in caplog.text
    file = folder / "validation.safetensors"
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    assert computes(params | {"cls_token": params["cls_token"] + 1}) and "its checksum is wrong" in caplog.text
    file.write_bytes(file.read_bytes()[:100])
    assert computes(params)


def test_a_stop_ends_it_before_anything_is_saved(run, tmp_path):
    stop = StopRequest()
    stop.requested = True
    assert features_of(run, run.first_state({}).params, "train", tmp_path / "features", stop) is None
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_each_classifier_is_trained_as_alone(run, clip_norm):
    """Against Nesterov's momentum in NumPy, with the decay in the gradient, a warm-up of 2 steps and a linear fall."""
    run.__dict__["config"] = run.config.replace({"optimizer.clip_norm": clip_norm, "optimizer.head_multiplier": 2.0})
    draw = np.random.default_rng(0)
    train_features = Features(draw.normal(size=(40, 16)).astype(np.float32), run.train_split.labels)
    head = {
        "classifier/kernel": draw.normal(size=(16, 4)).astype(np.float32),
        "classifier/bias": np.zeros(4, np.float32),
    }
    found = sweep(run, head, {"train": train_features}, RATES, DECAYS, StopRequest())
    assert [(c.learning_rate, c.weight_decay) for c in found] == [(r, d) for d in DECAYS for r in RATES]
    for candidate in (found[1], found[5]):
        kernel, bias, loss = in_numpy(
            head, train_features, candidate.learning_rate, candidate.weight_decay, clip_norm, run.config.seed
        )
        np.testing.assert_allclose(candidate.head["classifier/kernel"], kernel, atol=2e-4)
        np.testing.assert_allclose(candidate.head["classifier/bias"], bias, atol=2e-4)
        assert list(candidate.train) == [5, 10]
        assert candidate.train[10]["train/loss"] == pytest.approx(loss, rel=1e-3)


def in_numpy(head, features, peak, decay, clip_norm, seed):
    """Kernel, bias and last loss after 10 steps of 8."""
    kernel, bias = (head[f"classifier/{name}"].astype(np.float64) for name in ("kernel", "bias"))
    momenta = [np.zeros_like(kernel), np.zeros_like(bias)]
    order = np.concatenate([np.random.RandomState([seed, epoch]).permutation(40) for epoch in (0, 1)])
    for step in range(10):
        x, labels = (array[order[8 * step : 8 * step + 8]] for array in features)
        logits = x @ kernel + bias
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        loss = -np.log(p[np.arange(8), labels]).mean()
        error = (p - np.eye(4)[labels]) / 8
        gradients = [x.T @ error, error.sum(0)]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        if clip_norm and norm > clip_norm:
            gradients = [g * clip_norm / norm for g in gradients]
        gradients[0] = gradients[0] + decay * kernel
        momenta = [g + 0.9 * m for g, m in zip(gradients, momenta, strict=True)]
        rate = 2 * peak * (step / 2 if step < 2 else 1 - (step - 2) / 8)
        kernel, bias = (w - rate * (g + 0.9 * m) for w, g, m in zip((kernel, bias), gradients, momenta, strict=True))
    return kernel, bias, loss


def test_figures_count_as_numpy_does(run):
    draw = np.random.default_rng(0)
    features = Features(draw.normal(size=(50, 16)).astype(np.float32), draw.integers(0, 4, 50).astype(np.int32))
    head = {"classifier/kernel": draw.normal(size=(16, 4)), "classifier/bias": draw.normal(size=4)}
    logits = features.values @ head["classifier/kernel"] + head["classifier/bias"]
    right = logits.argmax(-1) == features.labels
    figures = figures_on(features, {path: x.astype(np.float32) for path, x in head.items()}, run)
    assert figures["val/accuracy"] == right.mean() and figures["val/examples"] == 50
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(50), features.labels]
    assert figures["val/loss"] == pytest.approx(losses.mean(), rel=1e-4)


def candidate(rate, accuracy, loss, last=0.1):
    return Candidate(rate, 0.0, {}, (), {10: {"train/loss": last}}, {"val/accuracy": accuracy, "val/loss": loss})


def test_the_best_figure_is_selected_then_the_smallest_loss_and_never_one_that_diverged():
    a, b, c, d = candidate(1, 0.8, 0.5), candidate(2, 0.9, 0.7), candidate(3, 0.9, 0.6), candidate(4, 0.95, np.nan)
    assert select([a, b, c, d], "val/accuracy") is c
    assert select([a, b, c, d], "val/loss") is a
    assert select([candidate(1, 0.8, 0.5, np.inf), b], "val/loss") is b
    with pytest.raises(UserError, match="not finite: give smaller --learning_rates"):
        select([d], "val/accuracy")


def test_the_same_command_finishes_what_was_stopped_and_repeats_nothing(probed, prepared, tmp_path, caplog):
    workdir = shutil.copytree(probed, tmp_path / "run")
    written = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").unlink()
    selection = json.loads((workdir / "selection.json").read_text())
    (workdir / "predictions.parquet").unlink()  # the test photographs are not scored yet
    assert run_probe(probe_config(prepared), workdir) == FINISHED
    assert "features" not in caplog.text
    assert json.loads((workdir / "results.json").read_text()) == written
    assert json.loads((workdir / "selection.json").read_text()) == selection
    with pytest.raises(
        UserError, match=r"holds a probe that tried other rates \(learning_rates 0.01, 0.1, 1; weight_decays 0, 0.1\)"
    ):
        run_probe(probe_config(prepared), workdir, [0.5])
    config = probe_config(prepared)
    config.batch_size = 4
    with pytest.raises(UserError, match="another configuration .*batch_size: 8 -> 4"):
        run_probe(config, workdir)


def test_a_training_refuses_a_probe_and_a_probe_a_training(probed, prepared, tmp_path):
    workdir = shutil.copytree(probed, tmp_path / "run")
    optimizer = metadata_of(workdir).config["optimizer"]
    config = probe_config(prepared)
    config.optimizer.update({name: optimizer[name] for name in ("learning_rate", "weight_decay")})
    before = json.loads((workdir / "results.json").read_text())
    with pytest.raises(UserError, match=r"run of `probe` with another configuration \(augment.flip.*pretrained="):
        train(config, workdir)  # a probe augments nothing
    config.augment.update(flip=False, contrast=(1.0, 1.0), gamma=(1.0, 1.0))
    assert train(config, workdir) == FINISHED and steps_of(workdir) == [10]
    assert json.loads((workdir / "results.json").read_text())["test"] == before["test"]
    (workdir / "sweep.json").unlink()
    with pytest.raises(UserError, match="holds a run of `train`, not of `probe`"):
        run_probe(probe_config(prepared), workdir)


def test_without_validation_photographs_one_classifier_is_trained(prepared, tmp_path):
    config = probe_config(prepared)
    config.data.validation = 0.0
    with pytest.raises(ConfigError, match="nothing says which classifier is the best: give one --learning_rates"):
        run_probe(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert run_probe(config, tmp_path / "run", [0.1], [0.0]) == FINISHED
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["selected"]["metric"] is None and results["test"]["examples"] == 15
    assert len(results["sweep"]) == 1 and open_run(tmp_path / "run").step == 12


def test_what_a_probe_cannot_do(prepared, tmp_path):
    config = probe_config(prepared)
    with pytest.raises(ConfigError, match="runs in one process"):
        probe(Config.read(config), tmp_path / "run", ProcessGroup(0, 2), RATES, DECAYS)
    config.trainable = "classifier|norm1"
    with pytest.raises(ConfigError, match="trains 4 other arrays, like encoder/layers/0/norm1/.*set config.trainable"):
        run_probe(config, tmp_path / "run")
    config.trainable = "classifier"
    unused = {"ema_decay": 0.9, "data.repeats": 2, "augment.mixup": 0.4, "augment.flip": False, "augment.policy":
              "randaugment", "model.drop_path": 0.3, "optimizer.layer_decay": 0.5, "microbatch": 2}  # fmt: skip
    for name, value in unused.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({name: value})
        with pytest.raises(
            ConfigError, match=f"config.{name} is set, but a probe trains on fixed features: leave it out"
        ):
            run_probe(changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_to_try_is_said_in_numbers(prepared):
    config = Config.read(probe_config(prepared))
    assert to_try(config, "0.1,1e-3", "0,0.5") == ([0.1, 1e-3], [0.0, 0.5])
    rates, decays = to_try(config, None, None)  # around 0.01 and 0.05
    assert min(rates) < 0.001 and max(rates) == pytest.approx(0.1) and decays == pytest.approx([0, 0.05, 0.5])
    for flag, text, least in (
        ("learning_rates", "0.1,0", 1e-9),
        ("weight_decays", "0.1;1", 0),
        ("weight_decays", "", 0),
    ):
        with pytest.raises(ConfigError, match=f"--{flag} is '{text}': give .*separated by commas"):
            numbers(flag, text, least)
