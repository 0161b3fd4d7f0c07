"""Training: what it computes, what a run leaves behind, and when it ends with an error."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pack import images_of
from tiny_runs import FINISHED, arrays_of, at, losses, metadata_of, prepared_run, read_evaluations, steps_of, train

from vit_nabirds.audit.program import collectives
from vit_nabirds.commands.evaluate import evaluate
from vit_nabirds.config import Config, default
from vit_nabirds.config.fields import Augment
from vit_nabirds.data.photographs import open_split
from vit_nabirds.data.table import read_table
from vit_nabirds.errors import UserError
from vit_nabirds.evaluation.scoring import make_eval_step
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import Normalization, to_float, zscore
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.parallel.devices import make_mesh, to_devices
from vit_nabirds.recipe.augmentation import augment, image_keys
from vit_nabirds.recipe.loss import cross_entropy
from vit_nabirds.runs.loading import open_run
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.runs.selection import Selection
from vit_nabirds.training.state import TrainState
from vit_nabirds.training.step import make_train_step, step_keys


def test_it_learns(undisturbed):
    trace = losses(undisturbed)
    assert sorted(trace) == list(range(1, 21))
    assert np.mean([trace[step] for step in (17, 18, 19, 20)]) < trace[1] - 0.05


def test_what_a_run_leaves(undisturbed, prepared):
    files = {file.name for file in undisturbed.iterdir()}
    assert {"config.json", "checkpoints", "tensorboard", "metrics.jsonl", "selection.json", "results.json"} <= files
    assert "predictions.parquet" in files and not [name for name in files if "partial" in name]
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["data"]["root"] == str(prepared) and config["model"]["hidden_size"] == 16
    evaluations = read_evaluations(undisturbed / "metrics.jsonl")
    assert list(evaluations) == [5, 10, 15, 20]
    for step, figures in Selection.read(undisturbed, [], "val/accuracy").evaluations.items():
        assert figures.items() <= evaluations[step].items() and figures["val/examples"] == 8
    tested = [step for step, figures in evaluations.items() if "test/accuracy" in figures]
    assert tested == sorted({20, json.loads((undisturbed / "results.json").read_text())["selected"]["step"]})


ACCURACIES = {"accuracy", "top5_accuracy", "mean_class_accuracy", "accuracy_level1"}


def test_the_results_are_those_of_the_selected_checkpoint_and_of_the_last(undisturbed):
    evaluations = read_evaluations(undisturbed / "metrics.jsonl")
    results = json.loads((undisturbed / "results.json").read_text())
    assert results.keys() == {"selected", "test", "last"}
    selected = results["selected"]
    assert selected["metric"] == "val/accuracy" and results["last"]["step"] == 20
    assert selected["value"] == max(evaluation["val/accuracy"] for evaluation in evaluations.values())
    for scores, step in ((results["test"], selected["step"]), (results["last"]["test"], 20)):
        figures = {f"test/{name}": value for name, value in scores.items() if not name.endswith("_interval")}
        assert figures.items() <= evaluations[step].items() and figures["test/examples"] == 15
        assert ACCURACIES | {"loss"} <= scores.keys()
        for name in ACCURACIES:
            low, high = scores[f"{name}_interval"]
            assert 0 <= low <= scores[name] <= high <= 1 and high - low > 0.1


def test_predictions_are_those_of_the_selected_checkpoint(undisturbed, prepared):
    results = json.loads((undisturbed / "results.json").read_text())
    predictions = pl.read_parquet(undisturbed / "predictions.parquet")
    table = read_table(prepared).filter(split="test")
    assert predictions.select("path", label=pl.col("label")).equals(table.select("path", label=pl.col("class_name")))
    right = (predictions["predictions"].list.first() == predictions["label"]).mean()
    assert right == pytest.approx(results["test"]["accuracy"])
    assert predictions["predictions"].list.n_unique().to_list() == [4] * 15  # of five at most
    assert predictions["probabilities"].list.sum().to_list() == pytest.approx([1.0] * 15, abs=1e-5)
    assert all(row == sorted(row, reverse=True) for row in predictions["probabilities"].to_list())


def test_without_validation_the_last_checkpoint_is_the_result(tiny_config, tmp_path, caplog):
    caplog.set_level("INFO", "vit_nabirds")
    tiny_config.data.validation, tiny_config.epochs = 0.0, 2.0
    tiny_config.evaluate.every = "6 steps"
    assert train(tiny_config, tmp_path) == FINISHED
    evaluations = read_evaluations(tmp_path / "metrics.jsonl")
    assert list(evaluations) == [6, 12] and all("val/accuracy" not in figures for figures in evaluations.values())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["selected"].pop("why") == "the last checkpoint: with data.validation=0 nothing is selected"
    assert results["selected"] == {"step": 12, "metric": None, "value": None}
    assert (
        results["test"] == results["last"]["test"] and results["test"]["accuracy"] == evaluations[12]["test/accuracy"]
    )
    assert "at step 12, the last checkpoint: with data.validation=0 nothing is selected" in caplog.text
    assert open_run(tmp_path).step == 12 and steps_of(tmp_path) == [6, 12]
    assert (tmp_path / "predictions.parquet").exists()
    assert list(Selection.read(tmp_path, [6, 12], None).evaluations) == [6, 12]  # so a resumed run scores neither again


def test_patience_ends_a_run_that_gets_no_better(tiny_config, tmp_path, caplog):
    caplog.set_level("INFO", "vit_nabirds")
    tiny_config.optimizer.learning_rate = 1e-30
    tiny_config.evaluate.every, tiny_config.evaluate.select, tiny_config.evaluate.patience = "2 steps", "loss", 3
    tiny_config.optimizer.warmup = "0 steps"
    for _ in range(2):  # a second start finds it finished
        assert train(tiny_config, tmp_path) == FINISHED
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["selected"]["step"] == 2 and results["last"]["step"] == 8
        assert results["selected"]["metric"] == "val/loss" and max(losses(tmp_path)) == 8
    assert "not better since, so 12 steps were left out" in caplog.text
    assert set(steps_of(tmp_path)) == {2, 6, 8} and open_run(tmp_path).step == 2


def test_categories_can_be_trained_on(tiny_config, tmp_path):
    tiny_config.data.label, tiny_config.epochs = "category", 1.0
    assert train(tiny_config, tmp_path) == FINISHED
    run = open_run(tmp_path)
    assert len(run.metadata.species) == 6 and run.params["classifier/bias"].shape == (6,)
    assert "accuracy_level1" in run.test and run.metadata.config["data"]["label"] == "category"
    assert evaluate(tmp_path) == 0


def test_a_run_goes_on_without_photographs_that_cannot_be_read(tiny_config, prepared, tmp_path, caplog):
    birds = shutil.copytree(prepared, tmp_path / "birds")
    table = read_table(birds, validation=tiny_config.data.validation)
    for split, index in (("train", 1), ("train", 2), ("validation", 1), ("test", 1)):
        (birds / "cleaned_images" / table.filter(split=split)["path"][index]).write_bytes(b"gone")
    tiny_config.data.root, tiny_config.epochs = str(birds), 1.0
    with pytest.raises(UserError, match="cannot be read"):
        train(tiny_config, tmp_path / "run")
    tiny_config.data.on_error = "skip"
    with pytest.raises(UserError, match="2 of 40 photographs cannot be read, more than config.data.max_skipped = 0.01"):
        train(tiny_config, tmp_path / "run")
    tiny_config.data.max_skipped = 0.2
    assert train(tiny_config, tmp_path / "run") == FINISHED
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["examples"] == 14 and results["test"]["skipped"] == 1
    assert read_evaluations(tmp_path / "run" / "metrics.jsonl")[5]["val/examples"] == 7
    predictions = pl.read_parquet(tmp_path / "run" / "predictions.parquet")
    assert predictions["predictions"].is_null().to_list() == [False, True, *[False] * 13]
    assert sum("Left out (2 of 40 photographs so far)." in message for message in caplog.messages) == 1


def test_every_line_of_the_metrics_has_step_epoch_and_time(undisturbed):
    lines = read_metrics(undisturbed / "metrics.jsonl")
    tested = [line for line in lines if "test/accuracy" in line]
    assert len(lines) == 20 + 4 + len(tested) and 1 <= len(tested) <= 2
    assert all(line["epoch"] == pytest.approx(line["step"] * 8 / 40) for line in lines)
    times = [line["time"] for line in lines]
    assert times == sorted(times) and 0 <= time.time() - times[0] < 24 * 3600


def test_the_log_has_step_and_epoch(tiny_config, tmp_path, caplog):
    caplog.set_level("INFO", "vit_nabirds")
    tiny_config.epochs, tiny_config.log_every = 1.0, 3
    assert train(tiny_config, tmp_path) == FINISHED
    shown = [message for message in caplog.messages if message.startswith("step ")]
    starts = ["step 1/5, epoch 0.20: loss ", "step 3/5, epoch 0.60: loss ", "step 5/5, epoch 1.00: loss "]
    starts += ["step 5/5, epoch 1.00: validation: loss ", "step 5/5, epoch 1.00: test: loss "]
    assert [message[: len(start)] for message, start in zip(shown, starts, strict=True)] == starts


def test_tensorboard_reads_what_was_written(undisturbed):
    events = EventAccumulator(str(undisturbed / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    expected = {"loss", "accuracy", "learning_rate", "gradient_norm", "images_per_second", "input_wait"}
    assert {f"train/{name}" for name in expected} <= set(tags["scalars"])
    for name in ("train/loss", "val/accuracy", "test/accuracy"):
        written = {line["step"]: line[name] for line in read_metrics(undisturbed / "metrics.jsonl") if name in line}
        assert {event.step: pytest.approx(event.value) for event in events.Scalars(name)} == written
    assert "train/augmented" in tags["images"]
    assert "hidden_size" in str(events.Tensors("config/text_summary")[0].tensor_proto)


def test_pretrained_weights_and_their_normalisation_are_used(tiny_config, hf_folder, tmp_path):
    tiny_config.model.pretrained = str(hf_folder)
    for field in ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim"):
        tiny_config.model[field] = None
    tiny_config.optimizer.learning_rate = 1e-30
    tiny_config.optimizer.weight_decay = 0.0
    tiny_config.epochs = 1.0
    assert train(tiny_config, tmp_path / "run") == FINISHED
    metadata = metadata_of(tmp_path / "run")
    assert metadata.normalization.mean == (0.1, 0.2, 0.3) and metadata.config["model"]["hidden_size"] == 16
    backbone = open_checkpoint(str(hf_folder)).load(metadata.architecture, labels=[])
    loaded = open_run(tmp_path / "run", 5).params
    assert set(loaded) - set(backbone) == {"classifier/kernel", "classifier/bias"}
    assert all(np.array_equal(loaded[path], backbone[path]) for path in backbone)


def test_both_steps_normalise_as_the_checkpoint_says(undisturbed):
    """Against the same written out: a head that is not zero, and a mean and std that are not the default."""
    model, params = describe(metadata_of(undisturbed).architecture, 4), open_run(undisturbed, 20).params
    other = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    draw = np.random.default_rng(0)
    batch = {
        "image": draw.integers(0, 256, (4, 20, 20, 3), np.uint8),
        "label": np.arange(4, dtype=np.int32),
        "row": np.arange(4, dtype=np.int32),
    }

    def loss_of(pixels):
        logits = model.logits(params, (pixels - np.array(other.mean)) / np.array(other.std))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    tx = optax.sgd(0.0)
    config = Config.read(default().to_dict() | {"seed": 3, "data": {"root": "data"}})
    step = make_train_step(config, model, tx, lambda step: 0.0, list(params), cross_entropy, other, make_mesh())
    state = TrainState(jnp.int32(5), jax.tree.map(jnp.array, params), tx.init(params))
    measured = step(state, batch)[1]["train/loss"]
    keys = image_keys(step_keys(3, 5)[0], jnp.arange(4))
    augmented = augment(batch["image"], keys, 16, Augment())
    assert float(measured) == pytest.approx(float(loss_of(augmented)), rel=1e-5)

    batch["image"] = batch["image"][:, :16, :16]
    zeros = {"loss": 0.0, "top5": 0, "confusion": jnp.zeros((4, 4), jnp.int32)}
    totals, _ = make_eval_step(model, other, make_mesh())(params, zeros, batch | {"mask": np.ones(4, np.float32)})
    assert float(totals["loss"]) / 4 == pytest.approx(float(loss_of(batch["image"] / np.float32(255))), rel=1e-5)


def test_evaluate_prints_the_numbers_of_training(undisturbed, tmp_path, capsys):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    written = (run / "results.json").read_text()
    trained = json.loads(written)
    for step, expected, by in ((None, trained, "val/accuracy"), (20, trained["last"], None)):
        assert evaluate(run, step) == 0
        printed = capsys.readouterr().out
        results = json.loads(printed)
        assert printed.count("\n") == 1 and results["test"] == expected["test"]
        assert results["step"] == (step or trained["selected"]["step"])
        assert results["selected_by"] == by or trained["selected"]["step"] == 20
    assert (run / "results.json").read_text() == written
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        evaluate(run, 7)


def test_evaluation_counts_as_numpy_does(undisturbed, prepared):
    """The sums on the devices, over batches with a padded last one, against one plain pass."""
    metadata, split = metadata_of(undisturbed), open_split(prepared, read_table(prepared), "test")
    images = zscore(to_float(images_of(split)), metadata.normalization)
    logits = np.asarray(describe(metadata.architecture, 4).logits(open_run(undisturbed, 20).params, images))
    right = logits.argmax(-1) == split.labels
    log_sum = np.log(np.exp(logits).sum(-1))
    measured = json.loads((undisturbed / "results.json").read_text())["last"]["test"]
    assert measured["accuracy"] == pytest.approx(right.mean())
    assert measured["loss"] == pytest.approx((log_sum - logits[np.arange(15), split.labels]).mean(), rel=1e-5)
    by_class = [right[split.labels == label].mean() for label in range(4)]
    assert measured["mean_class_accuracy"] == pytest.approx(np.mean(by_class))
    assert measured["top5_accuracy"] == 1


@pytest.mark.parametrize("pattern", ["classifier", "encoder/layers/1/|classifier"])
def test_what_is_not_trainable_stays_untouched_and_has_no_moments(tiny_config, tmp_path, pattern):
    tiny_config.trainable = pattern
    tiny_config.epochs = 1.0
    assert train(tiny_config, tmp_path) == FINISHED
    start = describe(metadata_of(tmp_path).architecture, 4).initial_params(0)
    params, saved = open_run(tmp_path, 5).params, arrays_of(tmp_path, 5)
    changed = {path for path in start if not np.array_equal(start[path], params[path])}
    expected = {path for path in start if re.search(pattern, path)}
    assert changed == expected and {"classifier/kernel", "classifier/bias"} <= expected < set(start)
    prefix = re.compile(r"training/opt_state/\d+/(mu|nu)/")
    assert {prefix.sub("", name) for name in saved if prefix.match(name)} == expected


def test_sgd_linear_decay_bfloat16_and_dropout_run(tiny_config, tmp_path):
    tiny_config.optimizer.name = "sgd"
    tiny_config.optimizer.schedule = "linear"
    tiny_config.compute_dtype = "bfloat16"
    tiny_config.model.dropout_rate = 0.1
    tiny_config.epochs = 1.0
    assert train(tiny_config, tmp_path) == FINISHED
    assert all(np.isfinite(loss) for loss in losses(tmp_path).values())


def test_devices_exchange_the_gradients_once_and_next_to_nothing_else(tiny_config, tmp_path):
    run = prepared_run(tiny_config, tmp_path)
    assert run.mesh.size == 2
    program = run.compile_step().as_text()
    found = collectives(program)
    assert {(c.kind, c.dtype) for c in found} == {("all-reduce", "f32"), ("all-reduce", "u32")}
    gradients = sum(int(np.prod(shape.shape)) for shape in run.model.shapes.values())
    assert sum(c.bytes for c in found) == 4 * (gradients + 3)  # loss, accuracy, checksum of the records


def test_the_compiled_step_is_kept_in_the_workdir(tiny_config, tmp_path, caplog):
    """For the next start of the job. With damaged files, or without a folder for them, the run goes on."""

    def forget() -> None:
        jax.clear_caches()
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()

    caplog.set_level("INFO", "vit_nabirds")
    tiny_config.epochs = 1.0
    forget()
    try:
        assert train(tiny_config, tmp_path / "a") == FINISHED
        kept = [file for file in (tmp_path / "a" / "compiled").iterdir() if "train_step" in file.name]
        assert kept
        for file in kept:
            file.write_bytes(file.read_bytes()[:100])
        shutil.rmtree(tmp_path / "a" / "checkpoints")
        (tmp_path / "a" / "results.json").unlink()
        forget()
        with pytest.warns(UserWarning, match="persistent compilation cache"):
            assert train(tiny_config, tmp_path / "a") == FINISHED
        forget()
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "compiled").write_text("a file")
        assert train(tiny_config, tmp_path / "b") == FINISHED
        assert "compiled programs are not kept: " in caplog.text
    finally:
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        compilation_cache.reset_cache()


def traced_steps(workdir) -> int:
    """By the annotation of each step."""
    files = (workdir / "tensorboard" / "plugins" / "profile").glob("*/*.trace.json.gz")
    events = [event for file in files for event in json.loads(gzip.open(file).read())["traceEvents"]]
    return sum(event.get("name") == "train" for event in events)


def test_a_trace_of_chosen_steps(tiny_config, tmp_path):
    tiny_config.epochs, tiny_config.profile = 1.0, "3-4"
    assert train(tiny_config, tmp_path) == FINISHED
    assert traced_steps(tmp_path) == 2
    assert list((tmp_path / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))


@pytest.mark.parametrize("profile, steps", [("14-17", 2), ("18-30", 3), ("2-15", 0)])
def test_a_trace_of_what_is_left_of_the_chosen_steps(undisturbed, tiny_config, tmp_path, caplog, profile, steps):
    """The run goes on from step 15 to step 20."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "20")
    caplog.set_level("INFO", "vit_nabirds")
    tiny_config.profile = profile
    assert train(tiny_config, run) == FINISHED
    assert traced_steps(run) == steps
    assert ("is not made: they are done already" in caplog.text) == (steps == 0)


def test_checkpoints_by_the_clock(tiny_config, tmp_path):
    tiny_config.checkpoint.every = "0.0000001 minutes"  # each step takes longer
    tiny_config.evaluate.every = "100 epochs"
    assert train(tiny_config, tmp_path) == FINISHED
    assert steps_of(tmp_path) == [19, 20]


@pytest.mark.parametrize("removed", [".", "checkpoints"])
def test_a_workdir_that_is_removed_is_noticed_at_the_next_save(tiny_config, tmp_path, removed):
    tiny_config.checkpoint.every = tiny_config.evaluate.every = "10 steps"
    with at("step 7/20", lambda: shutil.rmtree(tmp_path / "run" / removed)):
        with pytest.raises(UserError, match="checkpoints was removed or emptied .* and step 10 is not saved"):
            train(tiny_config, tmp_path / "run")


def test_parameters_that_overflow_are_not_saved(tiny_config, tmp_path):
    """Their loss is still finite: the next one is not."""
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 3e8
    tiny_config.optimizer.rules = ".* lr=1e30"
    tiny_config.optimizer.warmup, tiny_config.checkpoint.every = "0 steps", "1 step"
    with pytest.raises(UserError, match="the parameters after step 1 are not finite: lower"):
        train(tiny_config, tmp_path)
    assert steps_of(tmp_path) == []


def test_a_run_whose_losses_stay_not_finite_ends_with_the_state_before_them(tiny_config, tmp_path, caplog):
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 1e9
    tiny_config.max_bad_steps, tiny_config.checkpoint.every = 3, "1 step"
    tiny_config.evaluate.every = "100 epochs"
    with pytest.raises(UserError, match=r"the last 3 steps up to \d+ changed nothing, .* is saved: lower"):
        train(tiny_config, tmp_path)
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "train/bad_steps" in line]
    assert steps == list(range(steps[0], steps[0] + len(steps))) and len(steps) in (3, 4)
    rows = next(line["rows"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["step"] == steps[0])
    assert len(set(rows)) == 8
    assert f"step {steps[0]} changed nothing: its loss is nan, the norm of its gradient nan. It had " in caplog.text
    kept = [arrays_of(tmp_path, step) for step in steps_of(tmp_path)]
    assert steps_of(tmp_path)[-1] == steps[-1]
    assert all(np.isfinite(x).all() for x in kept[-1].values())
    tiny_config.max_bad_steps = 2  # may change, and the same command goes on from what is saved
    with pytest.raises(UserError, match=f"the last 2 steps up to {steps[-1] + 3}"):
        train(tiny_config, tmp_path)


@pytest.mark.parametrize("fields", [{}, {"mesh.fsdp": 2, "ema_decay": 0.9}])
def test_a_step_whose_loss_is_not_finite_changes_nothing_but_the_step(tiny_config, tmp_path, fields):
    tiny_config.update_from_flattened_dict(fields | {"optimizer.warmup": "0 steps"})
    run = prepared_run(tiny_config, tmp_path)
    step, batch = run.compile_step(), next(run.batches())
    bad = batch | {"label": np.full_like(batch["label"], 99)}  # no class has this number, so the loss is NaN
    batch, bad = (to_devices(x, run.mesh) for x in (batch, bad))
    first = jax.device_get(run.first_state({}))
    after, metrics = step(run.first_state({}), bad)
    assert not metrics["finite"] and np.isnan(metrics["train/loss"])
    changed = jax.tree.map(lambda old, new: not np.array_equal(old, new), first, jax.device_get(after))
    assert changed.step and not any(jax.tree.leaves(dataclasses.replace(changed, step=False)))
    after, metrics = step(after, batch)
    assert metrics["finite"] and np.isfinite(metrics["train/loss"])
    moved = jax.tree.map(lambda old, new: not np.array_equal(old, new), first, jax.device_get(after))
    assert any(moved.params.values())


def test_evaluate_scores_other_photographs_of_the_same_species(undisturbed, prepared, tmp_path, capsys, caplog):
    fewer = shutil.copytree(prepared, tmp_path / "fewer")
    table = pl.read_parquet(fewer / "metadata.parquet").sort("is_training_img")  # the test photographs first
    table.tail(-1).write_parquet(fewer / "metadata.parquet")
    before = (undisturbed / "results.json").read_text()
    assert evaluate(undisturbed, root=str(fewer)) == 0
    assert json.loads(capsys.readouterr().out)["test"]["examples"] == 14
    assert f"{fewer} has other records or images than the training had" in caplog.text
    assert (undisturbed / "results.json").read_text() == before
