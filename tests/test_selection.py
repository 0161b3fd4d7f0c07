"""Which evaluation counts as the best."""

import pytest

from vit_nabirds.runs.selection import TEST, Selection

EVALUATIONS = {  # accuracy, mean per-class accuracy, loss
    10: (0.80, 0.81, 0.60), 20: (0.90, 0.82, 0.50), 30: (0.90, 0.85, 0.40), 40: (0.90, 0.84, 0.40),
    50: (0.85, 0.85, 0.30),
}  # fmt: skip
NAMES = ("val/accuracy", "val/mean_class_accuracy", "val/loss")


def selection(tmp_path, metric):
    evaluations = {step: dict(zip(NAMES, values, strict=True)) for step, values in EVALUATIONS.items()}
    return Selection(tmp_path / "selection.json", metric, evaluations, {}, [])


@pytest.mark.parametrize(
    "metric, best, since",
    [("val/accuracy", 30, 2), ("val/mean_class_accuracy", 50, 0), ("val/loss", 50, 0), (None, 50, 0)],
)
def test_the_best_is_by_the_metric_then_by_the_loss_then_the_first(tmp_path, metric, best, since):
    found = selection(tmp_path, metric)
    assert found.best(list(EVALUATIONS)) == best and found.evaluations_since_best == since
    assert found.keep([10, 20, best]) == [best]
    assert found.best([]) is None


def test_only_steps_with_a_checkpoint_and_an_evaluation_can_be_best(tmp_path):
    assert selection(tmp_path, "val/accuracy").best([10, 50, 60]) == 50
    assert selection(tmp_path, "val/accuracy").best([60]) is None
    assert selection(tmp_path, None).best([10, 60]) == 60


def test_what_is_written_is_read(tmp_path):
    found = selection(tmp_path, "val/accuracy")
    found.tests[30] = dict.fromkeys(TEST, 0.875) | {"accuracy_interval": [0.8, 0.9]}
    found.write()
    (tmp_path / "predictions.parquet").touch()
    assert Selection.read(tmp_path, [10], "val/accuracy") == found
    (tmp_path / "predictions.parquet").unlink()  # written with the scores: without it they are made again
    assert Selection.read(tmp_path, [10], "val/accuracy").tests == {}
