"""What TensorBoard shows of a run, read back with its own reader."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tiny_runs import prepared_run

from vit_nabirds.runs import pictures
from vit_nabirds.runs.markdown import as_table
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.training import reporter as reporters
from vit_nabirds.training.introduction import info_of
from vit_nabirds.training.reporter import METRICS, Reporter


@pytest.fixture(scope="module")
def events(undisturbed) -> EventAccumulator:
    found = EventAccumulator(str(undisturbed / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    return found.Reload()


def test_curves_say_what_they_are_and_in_what_unit(events):
    expected = {
        "train/loss": "training loss [nats]", "val/top5_accuracy": "validation top-5 accuracy [share]",
        "train/images_per_second": "training throughput [images/s]", "test/accuracy_level1": "test accuracy at level 1",
    }  # fmt: skip
    for tag, name in expected.items():
        described = events.SummaryMetadata(tag)
        assert described.display_name.startswith(name) and described.summary_description
        assert (
            described.plugin_data.plugin_name == "scalars" and described.data_class
        )  # or TensorBoard's server drops it
    assert "train/memory_gib" in events.Tags()["scalars"] and 0.01 < events.Scalars("train/memory_gib")[-1].value < 100


def test_runs_are_compared_by_configuration_and_final_figures(events, undisturbed):
    def content(tag):
        return plugin_data_pb2.HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)

    given = content(metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    assert given["optimizer.learning_rate"].number_value == pytest.approx(0.01)
    assert given["optimizer.name"].string_value == "adamw" and "data.workers" not in given  # it changes no result
    assert content(metadata.SESSION_END_INFO_TAG).session_end_info.status
    results = json.loads((undisturbed / "results.json").read_text())
    assert events.Scalars("final/accuracy")[0].value == pytest.approx(results["test"]["accuracy"])
    assert events.Scalars("final/val_accuracy")[0].value == pytest.approx(results["selected"]["value"])


def test_texts_have_the_changed_fields_first_and_what_the_run_was_made_with(events):
    def text(name):
        return events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()

    config = text("config")
    changed, _, usual = config.partition("| field at its default | value |")
    assert "| optimizer.learning_rate | 0.01 | 0.0001 |" in changed and "| optimizer.name | adamw |" in usual
    assert all(f"| {what} | " in text("start") for what in ("command", "versions", "devices", "data", "revision"))
    assert as_table([("a|b\n<i>", "*x*")], ("k", "v")).splitlines()[-1] == "| a&#124;b &lt;i> | &#42;x&#42; |"


def test_pictures_are_as_wide_and_flat_as_tensorboard_shows_them(events):
    tags = events.Tags()["images"]
    assert {"train/augmented", "train/augmented_more", "test/confused", "test/mistakes", "test/confidence"} <= set(tags)
    for tag in tags:
        width, height = Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)).size
        assert width <= 900 and (height < width / 1.6 or "mistakes" in tag)  # of which there may be one


NAMES = ["Chuck-will's-widow", "$x_1^", "ornithological " * 9, "\u202e\x1b[31mred", "", "鳥"]


def test_names_of_any_kind_are_drawn():
    counts = np.arange(36).reshape(6, 6)
    for picture in (
        pictures.draw_row(np.zeros((6, 8, 8, 3), np.float32), [(name, name, name) for name in NAMES]),
        pictures.draw_confusion(NAMES, counts),
        pictures.draw_accuracies(NAMES, counts[0], counts.sum(0), "$title$"),
        pictures.draw_confidence(np.linspace(0, 1, 9), np.arange(9) > 3),
    ):
        assert picture.dtype == np.uint8 and picture.ndim == 3 and len(np.unique(picture)) > 5


def test_captions_are_cut_to_two_lines_of_the_width_of_their_photograph():
    font = pictures._font()
    for name in ["Black-throated Green Warbler", "by Somebody With Very Many Names", "x" * 99, "a b", ""]:
        rows = pictures.wrapped(name, font, 200)
        assert 1 <= len(rows) <= 2 and all(font.getlength(row) <= 200 for row in rows)
        assert "".join(name.split()).startswith("".join("".join(rows).split()).rstrip("…"))
    assert pictures.wrapped("Red faced Cormorant", font, 200) == ["Red faced", "Cormorant"]
    assert pictures.wrapped("90 % Black-capped Chickadee", font, 250)[0] == "90 % Black-capped"
    assert pictures.wrapped("Black-capped Chickadee", font, 100)[0] == "Black-"


def test_the_share_of_the_peak_is_that_of_the_products(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(reporters, "peak_of", lambda kind, dtype: 1e9)
    run = prepared_run(tiny_config, tmp_path)
    tracker = Tracker(info_of(run, "x"), run.plan, (), True)
    reporter = Reporter(run, tracker)
    metrics = dict.fromkeys(METRICS, jnp.float32(1)) | {"finite": True, "records": 1}
    for step in (1, 2):
        reporter.add(step, metrics)
    reporter.flush()
    tracker.close()
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        images = 4 * run.step_flops / 1e9  # seconds that a device needs for its four, at the peak
        assert line["train/mfu"] == pytest.approx(line["train/images_per_second"] / 8 * images / 4)
    # The linear layers of two blocks alone: each weight is used once forwards and twice backwards by 5 tokens.
    assert run.step_flops > 4 * 5 * 2 * 3 * 2 * (4 * 16 * 16 + 2 * 16 * 32)
