"""Training: what it computes, what a run leaves behind, and when it ends with an error."""

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
from tiny_runs import FINISHED, arrays_of, losses, metadata_of, prepared_run, steps_of, train

from vit_nabirds.audit.program import collectives
from vit_nabirds.commands.evaluate import evaluate
from vit_nabirds.data.photographs import open_split
from vit_nabirds.data.table import read_table
from vit_nabirds.errors import UserError
from vit_nabirds.evaluation.scoring import make_eval_step
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import Normalization, to_float, zscore
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.parallel.devices import make_mesh
from vit_nabirds.recipe.augmentation import augment
from vit_nabirds.runs.loading import open_run
from vit_nabirds.runs.metrics import read_evaluations, read_metrics
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
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["data"]["root"] == str(prepared) and config["model"]["hidden_size"] == 16
    evaluations = read_evaluations(undisturbed / "metrics.jsonl")
    assert list(evaluations) == [5, 10, 15, 20]
    assert Selection.read(undisturbed, []).evaluations == evaluations
    assert all(evaluation["test/examples"] == 15 for evaluation in evaluations.values())


def test_the_results_are_those_of_the_best_checkpoint_and_of_the_last(undisturbed):
    evaluations = read_evaluations(undisturbed / "metrics.jsonl")
    results = json.loads((undisturbed / "results.json").read_text())
    assert results.keys() == {"selected", "test", "last"}
    selected = results["selected"]
    assert selected["metric"] == "test/accuracy" and results["last"]["step"] == 20
    assert selected["value"] == max(evaluation["test/accuracy"] for evaluation in evaluations.values())
    for scores, step in ((results["test"], selected["step"]), (results["last"]["test"], 20)):
        assert {f"test/{name}": value for name, value in scores.items()} == evaluations[step]
    assert set(results["test"]) == {"loss", "accuracy", "top5_accuracy", "mean_class_accuracy", "examples"}


def test_every_line_of_the_metrics_has_step_epoch_and_time(undisturbed):
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert len(lines) == 20 + 4
    assert all(line["epoch"] == pytest.approx(line["step"] * 8 / 40) for line in lines)
    times = [line["time"] for line in lines]
    assert times == sorted(times) and 0 <= time.time() - times[0] < 24 * 3600


def test_the_log_has_step_and_epoch(tiny_config, tmp_path, caplog):
    caplog.set_level("INFO", "vit_nabirds")
    tiny_config.epochs, tiny_config.log_every = 1.0, 3
    assert train(tiny_config, tmp_path) == FINISHED
    shown = [message for message in caplog.messages if message.startswith("step ")]
    starts = ["step 1/5, epoch 0.20: loss ", "step 3/5, epoch 0.60: loss ", "step 5/5, epoch 1.00: loss "]
    starts.append("step 5/5, epoch 1.00: test/loss ")
    assert [message[: len(start)] for message, start in zip(shown, starts, strict=True)] == starts


def test_tensorboard_reads_what_was_written(undisturbed):
    events = EventAccumulator(str(undisturbed / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    expected = {"loss", "accuracy", "learning_rate", "gradient_norm", "images_per_second", "input_wait"}
    assert {f"train/{name}" for name in expected} <= set(tags["scalars"])
    for name in ("train/loss", "test/accuracy"):
        written = {line["step"]: line[name] for line in read_metrics(undisturbed / "metrics.jsonl") if name in line}
        assert {event.step: pytest.approx(event.value) for event in events.Scalars(name)} == written
    assert tags["images"] == ["train/augmented"]
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
    step = make_train_step(model, tx, lambda step: 0.0, list(params), other, 3, make_mesh())
    state = TrainState(jnp.int32(5), jax.tree.map(jnp.array, params), tx.init(params))
    measured = step(state, batch)[1]["train/loss"]
    assert float(measured) == pytest.approx(float(loss_of(augment(batch["image"], step_keys(3, 5)[0], 16))), rel=1e-5)

    batch["image"] = batch["image"][:, :16, :16]
    zeros = {"loss": 0.0, "top1": jnp.zeros(4), "top5": 0.0, "examples": jnp.zeros(4)}
    totals = make_eval_step(model, other)(params, zeros, batch | {"mask": np.ones(4, np.float32)})
    assert float(totals["loss"]) / 4 == pytest.approx(float(loss_of(batch["image"] / np.float32(255))), rel=1e-5)


def test_evaluate_prints_the_numbers_of_training(undisturbed, tmp_path, capsys):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    evaluations, written = read_evaluations(run / "metrics.jsonl"), (run / "results.json").read_text()
    best = json.loads(written)["selected"]["step"]
    for step, expected in ((None, best), (20, 20)):
        assert evaluate(run, step) == 0
        printed = capsys.readouterr().out
        results = json.loads(printed)
        assert printed.count("\n") == 1 and results["step"] == expected
        assert {f"test/{name}": value for name, value in results["test"].items()} == evaluations[expected]
    assert (run / "results.json").read_text() == written
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        evaluate(run, 7)


def test_evaluation_counts_as_numpy_does(undisturbed, prepared):
    """The sums on the devices, over batches with a padded last one, against one plain pass."""
    metadata, split = metadata_of(undisturbed), open_split(prepared, read_table(prepared), train=False)
    images = zscore(to_float(split.read(np.arange(15))["image"]), metadata.normalization)
    logits = np.asarray(describe(metadata.architecture, 4).logits(open_run(undisturbed, 20).params, images))
    right = logits.argmax(-1) == split.labels
    log_sum = np.log(np.exp(logits).sum(-1))
    measured = read_evaluations(undisturbed / "metrics.jsonl")[20]
    assert measured["test/accuracy"] == pytest.approx(right.mean())
    assert measured["test/loss"] == pytest.approx((log_sum - logits[np.arange(15), split.labels]).mean(), rel=1e-5)
    by_class = [right[split.labels == label].mean() for label in range(4)]
    assert measured["test/mean_class_accuracy"] == pytest.approx(np.mean(by_class))
    assert measured["test/top5_accuracy"] == 1


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


def test_parameters_that_overflow_are_not_saved(tiny_config, tmp_path):
    """Their loss is still finite: the next one is not."""
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 3e38
    tiny_config.optimizer.warmup, tiny_config.checkpoint.every = "0 steps", "1 step"
    with pytest.raises(UserError, match="the parameters after step 1 are not finite: lower"):
        train(tiny_config, tmp_path)
    assert steps_of(tmp_path) == []


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tiny_config, tmp_path):
    tiny_config.optimizer.name = "sgd"
    tiny_config.optimizer.learning_rate = 1e30
    with pytest.raises(UserError, match=r"the loss of step \d+ is (nan|inf): lower"):
        train(tiny_config, tmp_path)
    assert steps_of(tmp_path) == []


def test_evaluate_scores_other_photographs_of_the_same_species(undisturbed, prepared, tmp_path, capsys, caplog):
    fewer = shutil.copytree(prepared, tmp_path / "fewer")
    table = pl.read_parquet(fewer / "metadata.parquet").sort("is_training_img")  # the test photographs first
    table.tail(-1).write_parquet(fewer / "metadata.parquet")
    before = (undisturbed / "results.json").read_text()
    assert evaluate(undisturbed, root=str(fewer)) == 0
    assert json.loads(capsys.readouterr().out)["test"]["examples"] == 14
    assert f"{fewer} has other records or images than the training had" in caplog.text
    assert (undisturbed / "results.json").read_text() == before
