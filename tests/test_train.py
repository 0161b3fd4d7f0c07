"""Training: the same trace on any layout, exact resume, what is written, and what is refused."""

import gzip
import itertools
import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_nabirds.errors import UserError
from vit_nabirds.evaluation.scoring import evaluate_run, make_eval_step
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.parallel import devices
from vit_nabirds.recipe.augmentation import augment
from vit_nabirds.runs import checkpoints as checkpoint
from vit_nabirds.runs.loading import open_run
from vit_nabirds.runs.selection import Selection
from vit_nabirds.runs.tracker import read_evaluations, read_metrics
from vit_nabirds.training import loop as train
from vit_nabirds.training.loop import FINISHED, step_keys

STOPPED = 75


def losses(workdir):
    return {
        line["step"]: line["train/loss"] for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line
    }


def params_of(workdir, step):
    with_all = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
    return with_all._orbax.load_checkpointables(step)["params"]


def before_step(monkeypatch, step, do):
    """Do something between this step and the one before it."""
    ask, polls = devices.any_process, itertools.count()

    def asking(mesh, *flags):
        if len(flags) == 2 and next(polls) == step:  # the first poll of the training is before the loop
            do()
        return ask(mesh, *flags)

    monkeypatch.setattr(devices, "any_process", asking)


def stop_after(monkeypatch, step):
    """SIGTERM so that this step is the last."""

    def signal_and_wait():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.1)

    before_step(monkeypatch, step - 1, signal_and_wait)  # which has been asked by then: the next one asks again


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """A whole run of 20 steps on two devices."""
    from tiny_config import get_config

    config = get_config()
    config.data.root = str(prepared)
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert train.train(config, workdir) == FINISHED
    return workdir


def test_it_learns(undisturbed):
    trace = losses(undisturbed)
    assert sorted(trace) == list(range(1, 21))
    assert np.mean([trace[step] for step in (17, 18, 19, 20)]) < trace[1] - 0.05


def test_what_a_run_leaves(undisturbed, prepared):
    assert {"config.json", "checkpoints", "tensorboard", "metrics.jsonl", "results.json"} <= {
        file.name for file in undisturbed.iterdir()
    }
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["data"]["root"] == str(prepared) and config["model"]["hidden_size"] == 16
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["last"]["step"] == 20 and results["test"]["examples"] == 15
    assert set(results["test"]) == {"loss", "accuracy", "top5_accuracy", "mean_class_accuracy", "examples"}
    evaluations = read_evaluations(undisturbed / "metrics.jsonl")
    assert list(evaluations) == [5, 10, 15, 20]
    assert Selection.read(undisturbed, []).evaluations == evaluations
    selected = results["selected"]
    assert selected["value"] == evaluations[selected["step"]][selected["metric"]] == results["test"]["accuracy"]
    assert selected["value"] == max(evaluation["test/accuracy"] for evaluation in evaluations.values())
    assert all(evaluation["test/examples"] == 15 for evaluation in evaluations.values())


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


def test_newest_and_best_checkpoints_are_kept_and_tell_of_themselves(undisturbed):
    checkpoints = checkpoint.Checkpoints(undisturbed / "checkpoints", read_only=True)
    best = Selection.read(undisturbed, []).best([5, 10, 15, 20])
    assert set(checkpoints.steps) == {15, 20, best}
    about = checkpoints.about(20)
    assert len(about.species) == 4 and about.architecture["hidden_size"] == 16
    assert about.config["batch_size"] == 8 and about.normalization.mean == (0.5, 0.5, 0.5) and about.fingerprint


def test_a_checkpoint_tells_where_in_its_vectors_each_parameter_lies(undisturbed):
    checkpoints = checkpoint.Checkpoints(undisturbed / "checkpoints", read_only=True)
    arrays = checkpoints._orbax.checkpointables_metadata(20).custom_metadata["arrays"]["params"]
    vectors, params = params_of(undisturbed, 20), open_run(undisturbed, 20).params
    assert arrays.keys() == params.keys()
    for path, where in arrays.items():
        values = vectors[where["dtype"]][where["start"] :][: params[path].size]
        assert np.array_equal(values.reshape(where["shape"]), params[path])

    like = checkpoint.placed(params | {"classifier/bias": jnp.zeros(5)}, devices.replicated(devices.make_mesh()))
    with pytest.raises(UserError, match="checkpoints/20 was written by another version of this program"):
        checkpoints.restore(20, {"params": like})


@pytest.mark.parametrize("step", [1, 7, 10])
def test_a_stopped_and_resumed_run_is_bit_equal(undisturbed, tiny_config, tmp_path, monkeypatch, step):
    """Stopped at the first step, between evaluations, and where one is due."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert train.train(tiny_config, tmp_path) == STOPPED
    assert max(losses(tmp_path)) == step and not (tmp_path / "results.json").exists()
    tiny_config.checkpoint.every = "10 minutes"  # what changes no number may change
    assert train.train(tiny_config, tmp_path) == FINISHED
    assert losses(tmp_path) == losses(undisturbed)
    assert read_evaluations(tmp_path / "metrics.jsonl") == read_evaluations(undisturbed / "metrics.jsonl")
    for ours, theirs in zip(*(jax.tree.leaves(params_of(run, 20)) for run in (tmp_path, undisturbed)), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("lost", ["metrics.jsonl", "selection.json", "a bit of selection.json", "both"])
def test_the_best_checkpoint_outlives_a_resume_whatever_is_lost(tiny_config, tmp_path, monkeypatch, lost):
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        train.train(tiny_config, tmp_path)
    selection = Selection.read(tmp_path, [5, 7])
    assert list(selection.evaluations) == [5] and selection.unknown == []
    selection.evaluations[5]["test/accuracy"] = 1.0  # whatever comes is no better
    selection.write()
    log, file = tmp_path / "metrics.jsonl", tmp_path / "selection.json"
    if lost in ("metrics.jsonl", "both"):
        log.unlink()
    if lost in ("selection.json", "both"):
        file.unlink()
    if lost == "a bit of selection.json":
        file.write_text(file.read_text().replace("1.0", "0.0"))
    assert train.train(tiny_config, tmp_path) == FINISHED
    left = set(checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True).steps)
    if lost == "metrics.jsonl":
        assert left == {5, 15, 20}
    else:  # 7 was not evaluated, but that is lost, too
        assert left == {5, 7, 15, 20} | {Selection.read(tmp_path, []).best([10, 15, 20])}


def test_pretrained_weights_and_their_normalisation_are_used(tiny_config, hf_folder, tmp_path):
    tiny_config.model.pretrained = str(hf_folder)
    for field in ("image_size", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim"):
        tiny_config.model[field] = None
    tiny_config.optimizer.learning_rate = 1e-30
    tiny_config.optimizer.weight_decay = 0.0
    tiny_config.epochs = 1.0
    assert train.train(tiny_config, tmp_path / "run") == FINISHED
    about = checkpoint.newest(tmp_path / "run" / "checkpoints")[1]
    assert about.normalization.mean == (0.1, 0.2, 0.3) and about.config["model"]["hidden_size"] == 16
    backbone = train.weights.open_checkpoint(str(hf_folder)).load(about.architecture, labels=[])
    loaded = open_run(tmp_path / "run", 5).params
    assert set(loaded) - set(backbone) == {"classifier/kernel", "classifier/bias"}
    assert all(np.array_equal(loaded[path], backbone[path]) for path in backbone)


def test_both_steps_normalise_as_the_checkpoint_says(undisturbed):
    """Against the same written out: a head that is not zero, and a mean and std that are not the default."""
    about, params = checkpoint.newest(undisturbed / "checkpoints")[1], open_run(undisturbed, 20).params
    graphdef, _ = train.model.describe(about.architecture, 4)
    other = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    draw = np.random.default_rng(0)
    batch = {
        "image": draw.integers(0, 256, (4, 20, 20, 3), np.uint8),
        "label": np.arange(4, dtype=np.int32),
        "row": np.arange(4, dtype=np.int32),
    }

    def loss_of(pixels):
        logits = train.model.apply(graphdef, params, (pixels - np.array(other.mean)) / np.array(other.std))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    tx = optax.sgd(0.0)
    step = train.make_train_step(
        graphdef, tx, lambda step: 0.0, {path: [path] for path in params}, list(params), other, crop=16, seed=3
    )
    state = {"step": jnp.int32(5), "params": jax.tree.map(jnp.array, params), "opt_state": tx.init(params)}
    measured = step(state, batch)[1]["train/loss"]
    assert float(measured) == pytest.approx(float(loss_of(augment(batch["image"], step_keys(3, 5)[0], 16))), rel=1e-5)

    batch["image"] = batch["image"][:, :16, :16]
    zeros = {"loss": 0.0, "top1": jnp.zeros(4), "top5": 0.0, "examples": jnp.zeros(4)}
    totals = make_eval_step(graphdef, other)(params, zeros, batch | {"mask": np.ones(4, np.float32)})
    assert float(totals["loss"]) / 4 == pytest.approx(float(loss_of(batch["image"] / np.float32(255))), rel=1e-5)


def test_a_crash_loses_only_what_was_not_saved(undisturbed, tiny_config, tmp_path, monkeypatch):
    tiny_config.checkpoint.every = "3 steps"

    def die():
        raise RuntimeError("the machine died")

    with monkeypatch.context() as patch:
        before_step(patch, 12, die)
        with pytest.raises(RuntimeError, match="died"):
            train.train(tiny_config, tmp_path)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.steps[-1] == 10
    assert train.train(tiny_config, tmp_path) == FINISHED
    assert losses(tmp_path) == losses(undisturbed)


def test_evaluate_gives_the_numbers_of_training(undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    evaluations, written = read_evaluations(run / "metrics.jsonl"), (run / "results.json").read_text()
    best = json.loads(written)["selected"]["step"]
    for step, expected in ((None, best), (20, 20)):
        assert evaluate_run(run, step) == 0
        results = json.loads(capsys.readouterr().out)
        assert results["step"] == expected
        assert (run / "results.json").read_text() == written
        assert {f"test/{name}": value for name, value in results["test"].items()} == evaluations[expected]
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        evaluate_run(run, 7)


def test_evaluation_counts_as_numpy_does(undisturbed, prepared):
    """The sums on the devices, over batches with a padded last one, against one plain pass."""
    from vit_nabirds.data import batches as data
    from vit_nabirds.models import vit as model
    from vit_nabirds.models.normalization import to_float, zscore

    about = checkpoint.newest(undisturbed / "checkpoints")[1]
    split = data.open_split(prepared, data.read_table(prepared), train=False)
    graphdef, _ = model.describe(about.architecture, 4)
    images = np.stack([split[i]["image"] for i in range(15)])
    logits = np.asarray(
        model.apply(graphdef, open_run(undisturbed, 20).params, zscore(to_float(images), about.normalization))
    )
    right = logits.argmax(-1) == split.labels
    log_sum = np.log(np.exp(logits).sum(-1))
    measured = read_evaluations(undisturbed / "metrics.jsonl")[20]
    assert measured["test/accuracy"] == pytest.approx(right.mean())
    assert measured["test/loss"] == pytest.approx((log_sum - logits[np.arange(15), split.labels]).mean(), rel=1e-5)
    by_class = [right[split.labels == label].mean() for label in range(4)]
    assert measured["test/mean_class_accuracy"] == pytest.approx(np.mean(by_class))
    assert measured["test/top5_accuracy"] == 1


def test_training_the_head_alone_leaves_the_rest_untouched(tiny_config, tmp_path):
    tiny_config.trainable = "classifier"
    tiny_config.epochs = 1.0
    assert train.train(tiny_config, tmp_path) == FINISHED
    params = open_run(tmp_path).params
    start = train.model.initial_params(checkpoint.newest(tmp_path / "checkpoints")[1].architecture, 4, seed=0)
    changed = {path for path in start if not np.array_equal(start[path], params[path])}
    assert changed == {"classifier/kernel", "classifier/bias"}
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True)._orbax.checkpointables_metadata(5)
    moments = {name for name in saved.custom_metadata["arrays"]["training"] if "kernel" in name}
    assert moments and all("classifier/kernel" in name for name in moments)


def test_sgd_linear_decay_bfloat16_and_dropout_run(tiny_config, tmp_path):
    tiny_config.optimizer.name = "sgd"
    tiny_config.optimizer.schedule = "linear"
    tiny_config.compute_dtype = "bfloat16"
    tiny_config.model.dropout_rate = 0.1
    tiny_config.epochs = 1.0
    assert train.train(tiny_config, tmp_path) == FINISHED
    assert all(np.isfinite(loss) for loss in losses(tmp_path).values())


def test_a_layer_alone_is_trained(tiny_config, tmp_path):
    tiny_config.trainable = "encoder/layers/1/|classifier"
    tiny_config.epochs = 1.0
    assert train.train(tiny_config, tmp_path) == FINISHED
    loaded = open_run(tmp_path, 5).params
    start = train.model.initial_params(checkpoint.newest(tmp_path / "checkpoints")[1].architecture, 4, seed=0)
    changed = {path for path in start if not np.array_equal(start[path], loaded[path])}
    assert changed == {path for path in start if path.startswith(("encoder/layers/1/", "classifier/"))}


def test_devices_exchange_the_gradients_once_and_next_to_nothing_else():
    from tiny_config import SHAPE

    from benchmarks.scaling import audit

    shape = {name.replace("image_size", "img_size"): value for name, value in SHAPE.items()}
    found = audit(2, shape, per_device=4)
    assert set(found["collectives"]) == {"all-reduce"}
    assert found["all-reduced MB"] * 1e6 - found["gradients MB"] * 1e6 == 12  # loss, accuracy, checksum of the records


def test_the_compiled_step_is_kept_in_the_workdir(tiny_config, tmp_path, caplog):
    """For the next turn of the job; a damaged file is told and made anew, and without a place it goes on."""

    def forget() -> None:
        jax.clear_caches()
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()

    caplog.set_level("INFO", "vit_nabirds")
    tiny_config.epochs = 1.0
    forget()
    try:
        assert train.train(tiny_config, tmp_path / "a") == FINISHED
        kept = [file for file in (tmp_path / "a" / "compiled").iterdir() if "train_step" in file.name]
        assert kept
        programs = {file: file.read_bytes() for file in kept}
        for file in kept:
            file.write_bytes(programs[file][:100])
        shutil.rmtree(tmp_path / "a" / "checkpoints")
        (tmp_path / "a" / "results.json").unlink()
        forget()
        assert train.train(tiny_config, tmp_path / "a") == FINISHED
        assert all(f"{file} was damaged" in caplog.text for file in kept)
        assert [len(file.read_bytes()) > 100 for file in kept] == [True] * len(kept)
        forget()
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "compiled").write_text("a file")
        assert train.train(tiny_config, tmp_path / "b") == FINISHED
        assert "what is compiled is not kept: " in caplog.text
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
    assert train.train(tiny_config, tmp_path) == FINISHED
    assert traced_steps(tmp_path) == 2
    assert list((tmp_path / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))


@pytest.mark.parametrize("profile, steps", [("14-17", 2), ("18-30", 3), ("2-15", 0)])
def test_a_trace_of_what_is_left_of_the_chosen_steps(undisturbed, tiny_config, tmp_path, caplog, profile, steps):
    """The run goes on from step 15 to step 20."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "20")
    caplog.set_level("INFO", "vit_nabirds")
    tiny_config.profile = profile
    assert train.train(tiny_config, run) == FINISHED
    assert traced_steps(run) == steps
    assert ("is not made: they are done already" in caplog.text) == (steps == 0)


def test_checkpoints_by_the_clock(tiny_config, tmp_path):
    tiny_config.checkpoint.every = "0.0001 minutes"
    tiny_config.evaluate.every = "100 epochs"
    assert train.train(tiny_config, tmp_path) == FINISHED
    assert len(checkpoint.Checkpoints(tmp_path / "checkpoints", read_only=True).steps) > 1


def test_a_finished_run_stays_as_it_is(undisturbed, tiny_config):
    before = (undisturbed / "metrics.jsonl").read_text()
    assert train.train(tiny_config, undisturbed) == FINISHED
    assert (undisturbed / "metrics.jsonl").read_text() == before


def test_parameters_that_overflow_are_not_saved(tiny_config, tmp_path):
    """Their loss is still a number: it shows at the next step."""
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 3e38
    tiny_config.optimizer.warmup, tiny_config.checkpoint.every = "0 steps", "1 step"
    with pytest.raises(UserError, match="after step 1 are not finite"):
        train.train(tiny_config, tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(tiny_config, tmp_path):
    tiny_config.optimizer.name = "sgd"
    tiny_config.optimizer.learning_rate = 1e30
    with pytest.raises(UserError, match=r"the loss of step \d+ is (nan|inf)"):
        train.train(tiny_config, tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def change(field, value):
    def to(config):
        parent = config
        *path, name = field.split(".")
        for part in path:
            parent = parent[part]
        parent[name] = value

    return to


def birds_without_size(config):
    config.data.synthetic = True
    config.model.image_size = None


REFUSED = {
    "batch size": (change("batch_size", 7), "batch_size is 7, which 2 devices cannot share"),
    "no data": (change("data.root", ""), "config.data.root is empty"),
    "missing folder": (change("data.root", "/nowhere"), "/nowhere/metadata.parquet is missing"),
    "model too large": (
        change("model.image_size", 32),
        "test images 16 px, but the model takes 32: prepare one with --train_size=38",
    ),
    "odd patches": (change("model.patch_size", 5), "multiple of patch_size"),
    "missing shape": (change("model.patch_size", None), "config.model.patch_size is not set"),
    "optimizer": (change("optimizer.name", "lion"), "optimizer.name is 'lion': it must be 'adamw' or 'sgd'"),
    "no steps": (change("epochs", 0.0), "config.epochs is 0.0"),
    "duration": (change("checkpoint.every", "5 days"), "checkpoint.every is '5 days': write it like"),
    "evaluation by the clock": (
        change("evaluate.every", "5 minutes"),
        "'5 minutes': write it like '500 steps' or '1 ep",
    ),
    "trainable": (change("trainable", "clasifier"), "matches no parameter path"),
    "empty trainable": (change("trainable", ""), "config.trainable is ''"),
    "warm-up": (change("optimizer.warmup", "soon"), "optimizer.warmup is 'soon'"),
    "too many workers": (change("data.workers", 100_000), "data.workers is 100000"),
    "shape of the drawn birds": (birds_without_size, "model.image_size is None"),
    "regular expression": (change("trainable", "("), "not a regular expression"),
    "profile after the end": (change("profile", "21-30"), "config.profile is '21-30', but the run has 20 steps"),
    "profile": (change("profile", "12-10"), "config.profile is '12-10': name the first and last step"),
    "checkpoint": (change("model.pretrained", "/nowhere"), "no folder '/nowhere'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_told_before_anything_is_written(tiny_config, tmp_path, case):
    make_mistake, message = REFUSED[case]
    make_mistake(tiny_config)
    with pytest.raises(UserError, match=message):
        train.train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_same_workdir_is_refused(undisturbed, tiny_config, tmp_path):
    from vit_nabirds.data.prepare import prepare
    from vit_nabirds.data.synthetic import draw_archive

    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.01 -> 0.5"):
        train.train(tiny_config, undisturbed)
    draw_archive(tmp_path / "archive", species=3, train=4, test=2, size=(40, 60))
    prepare(tmp_path / "archive", tmp_path / "prepared", train_size=20, test_size=16)
    tiny_config.data.root = str(tmp_path / "prepared")
    with pytest.raises(UserError, match="checkpoint of 4 classes, but .* has 3"):
        train.train(tiny_config, undisturbed)
    with pytest.raises(UserError, match="trained on 4 species"):
        evaluate_run(undisturbed, root=str(tmp_path / "prepared"))


def test_other_records_of_the_same_species(undisturbed, tiny_config, prepared, tmp_path, caplog):
    fewer = tmp_path / "fewer"
    shutil.copytree(prepared, fewer)
    table = pl.read_parquet(fewer / "metadata.parquet")
    table.head(-2).write_parquet(fewer / "metadata.parquet")
    tiny_config.data.root = str(fewer)
    with pytest.raises(UserError, match="a run on other records"):
        train.train(tiny_config, undisturbed)
    before = (undisturbed / "results.json").read_text()
    assert evaluate_run(undisturbed, root=str(fewer)) == 0  # to score another test set is no mistake
    assert (undisturbed / "results.json").read_text() == before


def test_the_same_photographs_prepared_otherwise(undisturbed, tiny_config, prepared, tmp_path):
    other = shutil.copytree(prepared, tmp_path / "other")
    (other / "prepared.json").write_text((prepared / "prepared.json").read_text().replace("0.2", "0.1"))
    tiny_config.data.root = str(other)
    with pytest.raises(UserError, match=r"other records or images .*metadata.parquet or prepared.json differs"):
        train.train(tiny_config, undisturbed)


def test_damage_in_a_workdir_is_told(undisturbed, tiny_config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "checkpoints" / "20" / "params" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="checkpoints/20 is damaged: delete that folder"):
        train.train(tiny_config, run)
    shutil.rmtree(run / "checkpoints" / "20")
    file = max((run / "checkpoints" / "15" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(bytes(byte ^ (5000 < place < 5004) for place, byte in enumerate(whole)))
    with pytest.raises(UserError, match="checkpoints/15 is damaged: delete that folder"):
        train.train(tiny_config, run)
    file.write_bytes(whole)
    assert train.train(tiny_config, run) == FINISHED and losses(run) == losses(undisturbed)
    (run / "checkpoints" / "20" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(UserError, match="checkpoints/20 is damaged"):
        evaluate_run(run, 20)
    shutil.rmtree(run / "checkpoints" / "20")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("half a li\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line \d+ is not JSON"):
        train.train(tiny_config, run)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        evaluate_run(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="results of a run whose checkpoints are gone"):
        train.train(tiny_config, run)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train.train(tiny_config, tmp_path / "file")


def test_a_workdir_in_which_another_process_trains_is_refused(undisturbed, tiny_config, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    with locks.lock(tmp_path / "run" / "lock", "not this one"):
        with pytest.raises(UserError, match="another process trains in .*/run right now"):
            train.train(tiny_config, tmp_path / "run")
