"""Parts of the recipe in whole trainings: together, on another layout, over a restart."""

import json

import numpy as np
import pytest
from everything_config import get_config as everything
from tiny_config import SHAPE
from tiny_runs import FINISHED, STOPPED, arrays_of, at, losses, prepared_run, steps_of, terminate, train

from vit_nabirds.commands.evaluate import evaluate
from vit_nabirds.commands.export import export
from vit_nabirds.data.prepare import prepare
from vit_nabirds.errors import ConfigError
from vit_nabirds.evaluation.card import model_card
from vit_nabirds.evaluation.classifier import Classifier
from vit_nabirds.runs.checkpoints import Checkpoints, existing
from vit_nabirds.runs.loading import open_run
from vit_nabirds.training.microbatch import Memory, largest_that_fits


@pytest.fixture
def all_on(prepared):
    config = everything()
    config.data.root = str(prepared)
    return config


@pytest.fixture(scope="module")
def all_on_run(prepared, tmp_path_factory):
    config = everything()
    config.data.root = str(prepared)
    workdir = tmp_path_factory.mktemp("everything")
    assert train(config, workdir) == FINISHED
    return workdir


def test_everything_at_once_resumes_bit_by_bit_and_moves_to_another_layout(all_on, all_on_run, tmp_path):
    with at("step 9/20", terminate):
        assert train(all_on, tmp_path / "same") == STOPPED
    assert train(all_on, tmp_path / "same") == FINISHED
    assert losses(tmp_path / "same") == losses(all_on_run)
    ours, theirs = (arrays_of(folder, 20) for folder in (tmp_path / "same", all_on_run))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in ours)

    with at("step 9/20", terminate):
        assert train(all_on, tmp_path / "moved") == STOPPED
    all_on.mesh.fsdp, all_on.microbatch, all_on.remat = 1, 0, "none"
    assert train(all_on, tmp_path / "moved") == FINISHED
    found, expected = losses(tmp_path / "moved"), losses(all_on_run)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-3)


def test_the_average_is_what_is_evaluated_and_exported(all_on, all_on_run, tmp_path):
    """By its definition: decay min(0.9, (1 + step) / (10 + step)) from the first parameters on."""
    all_on.evaluate.every = all_on.checkpoint.every = "1 step"
    arrays = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "should_preserve", lambda self, found, context: [True] * len(found))
        assert train(all_on, tmp_path / "run") == FINISHED
    average = np.asarray(prepared_run(all_on, tmp_path / "none").first_state({}).params["classifier/kernel"])
    for step in steps_of(tmp_path / "run"):
        arrays = arrays_of(tmp_path / "run", step)
        decay = min(0.9, step / (9 + step))
        average = decay * average + (1 - decay) * arrays["params/classifier/kernel"]
    np.testing.assert_allclose(arrays["ema/classifier/kernel"], average, rtol=1e-5, atol=1e-7)
    assert "ema/encoder/layers/0/norm1/scale" not in arrays  # it is frozen
    loaded = open_run(tmp_path / "run", 20).params
    np.testing.assert_array_equal(loaded["classifier/kernel"], arrays["ema/classifier/kernel"])


def test_evaluate_repeats_what_a_training_with_all_parts_measured(all_on_run, capsys):
    results = json.loads((all_on_run / "results.json").read_text())
    assert evaluate(all_on_run, 20) == 0
    found = json.loads(capsys.readouterr().out)["test"]
    assert found["accuracy"] == results["last"]["test"]["accuracy"]
    assert found["loss"] == pytest.approx(results["last"]["test"]["loss"], rel=1e-5)
    card = model_card(open_run(all_on_run), "birds")
    assert "a moving average" in card and "averaged over 2 views of each." in card


@pytest.fixture
def low_rank(tiny_config, hf_folder):
    tiny_config.model.update(dict.fromkeys(("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")))
    tiny_config.model.pretrained, tiny_config.model.image_size = str(hf_folder), 16
    tiny_config.lora.rank = 2
    tiny_config.evaluate.every = tiny_config.checkpoint.every = "5 steps"
    return tiny_config


def test_lora_saves_its_own_parameters_alone_and_its_export_is_a_plain_model(low_rank, tmp_path):
    with at("step 9/20", terminate):
        assert train(low_rank, tmp_path / "run") == STOPPED
    assert train(low_rank, tmp_path / "run") == FINISHED
    assert train(low_rank, tmp_path / "whole") == FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    saved = {path for path in arrays_of(tmp_path / "run", 20) if path.startswith("params/")}
    assert saved and all("/lora/" in path or "/classifier/" in path for path in saved)
    export(tmp_path / "run", tmp_path / "exported", 20)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    ours, theirs = (
        next(iter(Classifier(**source)(picture)))
        for source in ({"workdir": tmp_path / "run", "step": 20}, {"model": tmp_path / "exported"})
    )
    assert ours["species"] == theirs["species"]
    np.testing.assert_allclose(ours["probability"], theirs["probability"], atol=1e-5)


def test_a_lora_run_needs_the_weights_it_started_from(low_rank, hf_folder, tmp_path):
    with at("step 9/20", terminate):
        assert train(low_rank, tmp_path / "run") == STOPPED
    moved = hf_folder.rename(tmp_path / "elsewhere")
    with pytest.raises(Exception, match=str(hf_folder)):
        train(low_rank, tmp_path / "run")
    low_rank.model.pretrained = str(moved)
    assert train(low_rank, tmp_path / "run") == FINISHED
    assert existing(tmp_path / "run" / "checkpoints")[1].config["model"]["pretrained"] == str(moved)


def test_a_microbatch_is_chosen_by_the_memory_that_there_is(tiny_config, tmp_path, monkeypatch):
    used = {0: 100, 16: 60, 8: 40, 4: 30, 2: 25, 1: 24}
    for available, chosen in ((100, 0), (99, 16), (39, 4), (24, 1), (3, 1)):
        assert largest_that_fits(32, lambda size: used[size] <= available) == chosen  # noqa: B023
    assert largest_that_fits(32, lambda size: False, pairs=True) == 2
    assert largest_that_fits(24, lambda size: used[size] <= 50) == 8
    tiny_config.batch_size = 32
    run = prepared_run(tiny_config, tmp_path)
    sizes = {
        size: Memory.of(run.make_step(size).trace(run.state_shapes(), run.batch_shapes()).lower().compile()).total
        for size in (0, 8)
    }
    assert sizes[8] < sizes[0]
    monkeypatch.setattr("vit_nabirds.training.run.memory_of", lambda device: sizes[0] - 1)
    tiny_config.microbatch = -1
    found = []
    with at("microbatch 8: of 16 images a device works on so many at once", lambda: found.append(True)):
        assert train(tiny_config, tmp_path / "run") == FINISHED


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(microbatch=3), "config.microbatch is 3, which does not divide the 4 images of a device"),
        (
            lambda c: (c.update(batch_size=6), c.augment.update(mixup=0.2)),
            "mixes images in pairs, but .* works on 3 at",
        ),
        (
            lambda c: (c.update(microbatch=1), c.augment.update(cutmix=1.0)),
            "mixes images in pairs, but .* works on 1 at",
        ),
        (lambda c: c.mesh.update(fsdp=3), "config.mesh.fsdp is 3, but there are 2 devices"),
        (lambda c: c.data.update(repeats=3), "config.data.repeats is 3"),
        (lambda c: c.optimizer.update(cooldown="3 steps"), "config.optimizer.cooldown"),
        (lambda c: c.optimizer.update(rules="encodr frozen"), "encodr"),
        (lambda c: c.lora.update(rank=2), "config.lora.rank is not 0, but there are no weights to change"),
        (lambda c: (c.loss.update(class_weights="balanced"), c.data.update(sampling="sqrt")), "both make up for rare"),
        (lambda c: c.augment.update(area=(0.9, 0.1)), "config.augment.area is"),
        (lambda c: c.augment.update(area=(0.1, 0.9)), "config.augment.area is set, but has no effect without"),
        (lambda c: c.augment.update(mixed=0.5), "config.augment.mixed is set, but has no effect without"),
        (lambda c: c.lora.update(alpha=32.0), "config.lora.alpha is set, but has no effect without config.lora.rank"),
        (lambda c: c.lora.update(targets="attn"), "config.lora.targets is set, but has no effect without"),
        (lambda c: c.optimizer.update(momentum=0.5), "momentum is set, .* without config.optimizer.name=sgd"),
        (lambda c: c.data.update(max_skipped=0.5), "max_skipped is set, .* without config.data.on_error=skip"),
        (
            lambda c: (c.data.update(validation=0.0), c.evaluate.update(select="loss")),
            "select is set, but has no effect without config.data.validation",
        ),
        (lambda c: c.update(trainable="encoder"), "the classifier is new and starts from zero, but it is frozen"),
        (lambda c: c.optimizer.update(rules="classifier frozen"), "the classifier is new and starts from zero"),
        (lambda c: (c.lora.update(rank=2), c.update(trainable="layers")), "config.trainable is 'layers': leave it out"),
    ],
)
def test_parts_that_cannot_go_together_are_a_mistake(tiny_config, tmp_path, change, message):
    change(tiny_config)
    with pytest.raises(ConfigError, match=message):
        prepared_run(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_random_weights_is_a_start_for_another_resolution(undisturbed, prepared, tiny_config, tmp_path):
    prepare(prepared.parent / "archive", tmp_path / "larger", train_size=28, test_size=24)
    tiny_config.data.root, tiny_config.epochs = str(tmp_path / "larger"), 1.0
    tiny_config.model.update(dict.fromkeys(SHAPE), pretrained=str(undisturbed), image_size=24)
    assert train(tiny_config, tmp_path / "run") == FINISHED
    assert open_run(tmp_path / "run").params["position_embeddings"].shape == (1, 10, 16)
