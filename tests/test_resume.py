"""A run that goes on after a stop or a crash: the same numbers, whatever layout, and nothing of another run."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tiny_runs import (
    FINISHED,
    STOPPED,
    arrays_of,
    at,
    crash,
    losses,
    metadata_of,
    read_evaluations,
    steps_of,
    terminate,
    train,
)  # fmt: skip

from vit_nabirds import cli
from vit_nabirds.commands.evaluate import evaluate
from vit_nabirds.config import Config
from vit_nabirds.config.plan import Plan
from vit_nabirds.errors import TransientError, UserError
from vit_nabirds.files import crc32_of
from vit_nabirds.parallel.locks import lock
from vit_nabirds.recipe.optimizer import make_schedule
from vit_nabirds.runs.checkpoints import DamagedCheckpoint, damage_set_aside
from vit_nabirds.runs.metrics import read_metrics, split_metrics
from vit_nabirds.runs.selection import Selection


@pytest.mark.parametrize(
    "moment, step, evaluated",
    [
        ("compiled in", 1, []),
        ("step 5/20", 5, []),  # the checkpoint of step 5 is there, its evaluation not yet
        ("step 6/20", 8, [5]),
        ("step 8/20", 10, [5]),  # no evaluation where one is due, after a request to stop
    ],
)
def test_a_stopped_and_resumed_run_is_bit_equal(undisturbed, tiny_config, tmp_path, moment, step, evaluated):
    with at(moment, terminate):
        assert train(tiny_config, tmp_path) == STOPPED
    assert max(losses(tmp_path)) == step == steps_of(tmp_path)[-1]
    assert list(read_evaluations(tmp_path / "metrics.jsonl")) == evaluated
    assert not (tmp_path / "results.json").exists()
    tiny_config.checkpoint.every = "10 minutes"  # changes no number
    assert train(tiny_config, tmp_path) == FINISHED
    assert losses(tmp_path) == losses(undisturbed)
    assert read_evaluations(tmp_path / "metrics.jsonl") == read_evaluations(undisturbed / "metrics.jsonl")
    ours, theirs = arrays_of(tmp_path, 20), arrays_of(undisturbed, 20)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_crash_loses_only_what_was_not_saved(undisturbed, tiny_config, tmp_path):
    tiny_config.checkpoint.every = "4 steps"
    with at("step 9/20", crash), pytest.raises(RuntimeError, match="died"):
        train(tiny_config, tmp_path)
    assert max(losses(tmp_path)) == 9 and steps_of(tmp_path) == [5, 8]
    assert train(tiny_config, tmp_path) == FINISHED
    assert losses(tmp_path) == losses(undisturbed)


def test_a_finished_run_stays_as_it_is(undisturbed, tiny_config):
    names = ("metrics.jsonl", "results.json", "selection.json")
    before = [(undisturbed / name).read_text() for name in names], steps_of(undisturbed)
    assert train(tiny_config, undisturbed) == FINISHED
    assert ([(undisturbed / name).read_text() for name in names], steps_of(undisturbed)) == before


def test_a_run_moves_between_four_devices_and_one(main, undisturbed, tmp_path):
    """Stopped between evaluations on four devices and in an evaluation on one; compared with a run on two."""
    workdir = tmp_path / "run"
    for devices, moment, step in ((4, "step 6/20", 8), (1, "step 10/20", 10), (4, None, 20)):
        done = main("train", *main.tiny, f"--workdir={workdir}", devices=devices, stop_at=moment or "")
        assert done.returncode == (75 if moment else 0), done.stderr
        assert f"on {devices} cpu device(s)" in done.stderr and steps_of(workdir)[-1] == step
    assert losses(workdir) == pytest.approx(losses(undisturbed), rel=1e-4)
    evaluations = read_evaluations(workdir / "metrics.jsonl")
    assert [evaluation["val/examples"] for evaluation in evaluations.values()] == [8] * 4


@pytest.mark.parametrize("lost", ["metrics.jsonl", "selection.json", "a bit of selection.json", "both"])
def test_the_best_checkpoint_outlives_a_resume_whatever_is_lost(tiny_config, tmp_path, lost):
    with at("step 6/20", terminate):
        train(tiny_config, tmp_path)
    selection = Selection.read(tmp_path, [5, 8], "val/accuracy")
    assert list(selection.evaluations) == [5] and selection.unknown == []
    selection.evaluations[5]["val/accuracy"] = 2.0  # nothing later is better
    selection.write()
    log, file = tmp_path / "metrics.jsonl", tmp_path / "selection.json"
    if lost in ("metrics.jsonl", "both"):
        log.unlink()
    if lost in ("selection.json", "both"):
        file.unlink()
    if lost == "a bit of selection.json":
        file.write_text(file.read_text().replace("2.0", "0.0"))
    assert train(tiny_config, tmp_path) == FINISHED
    if lost == "metrics.jsonl":
        assert steps_of(tmp_path) == [5, 15, 20]
    else:  # step 8 was not evaluated, but that is lost too
        best = Selection.read(tmp_path, [], "val/accuracy").best([10, 15, 20])
        assert steps_of(tmp_path) == sorted({5, 8, 15, 20, best})


@pytest.mark.parametrize("again", ["the selection is lost", "patience was too short"])
def test_a_finished_run_is_judged_by_what_is_known(undisturbed, tiny_config, tmp_path, again):
    """A checkpoint whose evaluation is lost is scored again; what an earlier end left goes with it."""
    if again == "the selection is lost":
        run, before = shutil.copytree(undisturbed, tmp_path / "run"), (undisturbed / "results.json").read_text()
        (run / "selection.json").unlink()
    else:
        run, before = tmp_path / "run", None
        tiny_config.evaluate.every, tiny_config.evaluate.patience = "1 step", 1
        assert train(tiny_config, run) == FINISHED and steps_of(run)[-1] < 20
        tiny_config.evaluate.patience = 0
        with at("step 15/20", terminate):
            assert train(tiny_config, run) == STOPPED
        assert not (run / "results.json").exists() and not (run / "predictions.parquet").exists()
        tiny_config.evaluate.every = "5 steps"
    assert train(tiny_config, run) == FINISHED
    results = json.loads((run / "results.json").read_text())
    assert results["last"]["step"] == 20 and (run / "predictions.parquet").exists()
    if before:
        assert results == json.loads(before)


def unfinished(undisturbed, tmp_path):
    """A copy that goes on from step 15."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "20")
    (run / "results.json").unlink()
    return run


def rewrite_metadata(step_folder, change):
    """Change the metadata of a checkpoint as another version of the program would have written it."""
    file = step_folder / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    fields = content["custom_metadata"]
    fields.pop("crc32", None)
    change(fields)
    content["custom_metadata"] = fields | ({"crc32": crc32_of(fields)} if "format" in fields else {})
    file.write_text(json.dumps(content))


def test_a_run_of_an_earlier_version_without_some_fields_goes_on(undisturbed, tiny_config, tmp_path):
    run = unfinished(undisturbed, tmp_path)

    def shorten(fields):
        for section, field in (
            (None, "remat"),
            ("optimizer", "clip_norm"),
            ("model", "pretrained"),
            (None, "trainable"),
        ):
            del (fields["config"][section] if section else fields["config"])[field]

    rewrite_metadata(run / "checkpoints" / "15", shorten)
    assert evaluate(run, 15) == 0
    tiny_config.batch_size = 4
    with pytest.raises(UserError, match=r"another configuration \(batch_size: 8 -> 4\)"):
        train(tiny_config, run)
    tiny_config.batch_size, tiny_config.optimizer.clip_norm = 8, 1.0
    with pytest.raises(UserError, match=r"another configuration \(optimizer.clip_norm: 0.0 -> 1.0\)"):
        train(tiny_config, run)
    tiny_config.optimizer.clip_norm = 0.0
    assert train(tiny_config, run) == FINISHED
    assert losses(run) == losses(undisturbed)


@pytest.mark.parametrize("other", [1, 3, None])
def test_a_checkpoint_of_another_format_is_refused(undisturbed, tiny_config, tmp_path, other):
    """The first format had no number."""
    run = unfinished(undisturbed, tmp_path)
    rewrite_metadata(run / "checkpoints" / "15", lambda fields: fields.update(format=other))
    if other is None:
        rewrite_metadata(run / "checkpoints" / "15", lambda fields: fields.pop("format"))
    with pytest.raises(UserError, match="checkpoints/15 was written by another version of this program"):
        train(tiny_config, run)


@pytest.mark.parametrize("was, becomes", [("0.5", "0.7"), ('"arrays"', '"arrayr"'), ('"format"', '"formau"')])
def test_a_changed_bit_in_the_metadata_is_damage(undisturbed, tiny_config, tmp_path, was, becomes):
    run = unfinished(undisturbed, tmp_path)
    file = run / "checkpoints" / "15" / "_CHECKPOINT_METADATA"
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, becomes, 1))
    for use in (lambda: evaluate(run, 15), lambda: train(tiny_config, run)):
        with pytest.raises(UserError, match="checkpoints/15 is damaged"):
            use()


def test_another_configuration_in_the_same_workdir_is_refused(undisturbed, tiny_config):
    for section, name, value, message in (
        ("optimizer", "learning_rate", 0.5, "optimizer.learning_rate: 0.01 -> 0.5"),
        ("data", "validation", 0.0, "data.validation: 0.16666666666666666 -> 0.0"),
        ("data", "label", "category", "data.label: species -> category"),
        ("evaluate", "select", "loss", "evaluate.select: accuracy -> loss"),
    ):
        before, tiny_config[section][name] = tiny_config[section][name], value
        with pytest.raises(UserError, match=message):
            train(tiny_config, undisturbed)
        tiny_config[section][name] = before


def test_other_species_are_refused_by_name(undisturbed, tiny_config, tmp_path, prepared):
    other = shutil.copytree(prepared, tmp_path / "other")
    table = pl.read_parquet(other / "metadata.parquet")
    names = sorted(set(table["species_name"]))
    renamed = table.with_columns(pl.col("species_name").replace(names[0], "Dodo"))
    renamed.write_parquet(other / "metadata.parquet")
    differ = f"(the run 4, the data 4; only in the run: {names[0]}; only in the data: Dodo)"
    tiny_config.data.root = str(other)
    with pytest.raises(UserError) as refused:
        train(tiny_config, undisturbed)
    assert "holds a run on other classes than" in str(refused.value) and differ in str(refused.value)
    with pytest.raises(UserError) as refused:
        evaluate(undisturbed, root=str(other))
    assert "has other classes than the run" in str(refused.value) and differ in str(refused.value)

    table.filter(pl.col("species_name") != names[0]).write_parquet(other / "metadata.parquet")
    with pytest.raises(UserError) as refused:
        train(tiny_config, undisturbed)
    assert f"(the run 4, the data 3; only in the run: {names[0]})" in str(refused.value)


def test_other_records_of_the_same_species_are_refused(undisturbed, tiny_config, prepared, tmp_path):
    fewer = shutil.copytree(prepared, tmp_path / "fewer")
    pl.read_parquet(fewer / "metadata.parquet").head(-2).write_parquet(fewer / "metadata.parquet")
    tiny_config.data.root = str(fewer)
    with pytest.raises(UserError, match="a run on other records"):
        train(tiny_config, undisturbed)


def test_the_same_photographs_prepared_otherwise_are_refused(undisturbed, tiny_config, prepared, tmp_path):
    other = shutil.copytree(prepared, tmp_path / "other")
    (other / "prepared.json").write_text((prepared / "prepared.json").read_text().replace("0.2", "0.1"))
    tiny_config.data.root = str(other)
    with pytest.raises(UserError, match=r"other records or images .*metadata.parquet or prepared.json differs"):
        train(tiny_config, undisturbed)


def test_damage_in_a_workdir_is_reported(undisturbed, tiny_config, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    file = max((run / "checkpoints" / "15" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(bytes(byte ^ (5000 < place < 5004) for place, byte in enumerate(whole)))
    with pytest.raises(UserError, match="checkpoints/15 is damaged: delete that folder"):
        evaluate(run, 15)
    file.write_bytes(whole)
    (run / "checkpoints" / "20" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(UserError, match="checkpoints/20 is damaged"):
        evaluate(run, 20)
    shutil.rmtree(run / "checkpoints" / "20")
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        evaluate(run)
    shutil.rmtree(run / "checkpoints")
    shutil.copy(undisturbed / "results.json", run)
    with pytest.raises(UserError, match="results of a run whose checkpoints are gone"):
        train(tiny_config, run)


@pytest.mark.parametrize("part", ["_CHECKPOINT_METADATA", "params/_METADATA", "training"])
def test_a_training_goes_on_from_the_newest_checkpoint_that_is_intact(
    undisturbed, prepared, tmp_path, capfd, monkeypatch, part
):
    run = unfinished(undisturbed, tmp_path)
    steps = steps_of(run)
    damage(run / "checkpoints" / str(steps[-1]) / part)
    log = logging.getLogger("vit_nabirds")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    config = Path(__file__).with_name("tiny_config.py")
    assert cli.main(["train", f"--config={config}", f"--config.data.root={prepared}", f"--workdir={run}"]) == FINISHED
    said = capfd.readouterr().err
    assert (
        f"checkpoints/{steps[-1]} is damaged and lies in {run}/damaged now: the run goes on from step {steps[-2]}"
        in said
    )
    assert (run / "damaged" / str(steps[-1])).is_dir() and losses(run) == losses(undisturbed)


def test_a_finished_run_goes_on_with_more_epochs_and_another_rate(undisturbed, tiny_config, tmp_path, caplog):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    tiny_config.epochs, tiny_config.optimizer.learning_rate = 6.0, 0.004
    with pytest.raises(UserError, match=r"epochs: 4.0 -> 6.0; .*, or pass --accept_changes to go on with it from the"):
        train(tiny_config, run)
    assert train(tiny_config, run, accept_changes=True) == FINISHED
    config = Config.read(tiny_config)
    expected = make_schedule(config, Plan.of(config, 40))
    rates = {
        line["step"]: line["train/learning_rate"]
        for line in read_metrics(run / "metrics.jsonl")
        if "train/loss" in line
    }
    assert list(rates) == list(range(1, 31))
    assert all(rates[step] == pytest.approx(float(expected(step - 1)), rel=1e-5) for step in range(21, 31))
    changed = {"epochs": "4.0 -> 6.0", "optimizer.learning_rate": "0.01 -> 0.004"}
    assert metadata_of(run).history == [{"step": 20, "changed": changed}]
    assert "changed from step 20 on: " in caplog.text
    assert train(tiny_config, run, accept_changes=True) == train(tiny_config, run) == FINISHED  # no change any more
    assert metadata_of(run).history == [{"step": 20, "changed": changed}]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c.update(batch_size=4, epochs=6.0),
            r"configuration \(batch_size: 8 -> 4\): use another --workdir, or take",
        ),
        (lambda c: c.data.update(validation=0.2), "data.validation"),
        (
            lambda c: c.optimizer.update(name="sgd"),
            r"the change \(optimizer.name\) needs other parameters or another state",
        ),
        (lambda c: c.update(ema_decay=0.9), r"the change \(ema_decay\) needs other"),
        (lambda c: c.update(trainable="classifier"), "trainable: "),
    ],
)
def test_what_can_never_change_on_the_way(undisturbed, tiny_config, tmp_path, change, message):
    run = unfinished(undisturbed, tmp_path)
    change(tiny_config)
    with pytest.raises(UserError, match=message):
        train(tiny_config, run, accept_changes=True)
    assert steps_of(run)[-1] == 15 and metadata_of(run).history == []


def test_a_run_goes_on_from_an_earlier_checkpoint_at_a_lower_rate(undisturbed, tiny_config, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    tiny_config.optimizer.learning_rate = 0.001
    with pytest.raises(UserError, match="--from_step is 3, but .* has checkpoints of "):
        train(tiny_config, run, accept_changes=True, from_step=3)
    with pytest.raises(UserError, match="--from_step is 3, but .* has no checkpoints"):
        train(tiny_config, tmp_path / "new", accept_changes=True, from_step=3)
    assert steps_of(run) == steps_of(undisturbed) and not (tmp_path / "new").exists()
    assert train(tiny_config, run, accept_changes=True, from_step=15) == FINISHED
    assert (run / "left" / "20").is_dir() and metadata_of(run).history[0]["step"] == 15
    kept = steps_of(run)
    assert train(tiny_config, run, accept_changes=True, from_step=15) == FINISHED  # as a job that is queued again
    assert steps_of(run) == kept and [file.name for file in (run / "left").iterdir()] == ["20"]
    before, after = losses(undisturbed), losses(run)
    assert [step for step in before if before[step] != after[step]][
        0
    ] == 17  # the rate of step 16 shows in the loss of 17


def test_a_checkpoint_that_does_not_open_is_set_aside_whichever_it_is(undisturbed, prepared, tmp_path, monkeypatch):
    run = unfinished(undisturbed, tmp_path)
    first = steps_of(run)[0]
    (run / "checkpoints" / str(first) / "_CHECKPOINT_METADATA").write_text("{")
    monkeypatch.setattr(logging.getLogger("vit_nabirds"), "handlers", [])
    config = Path(__file__).with_name("tiny_config.py")
    assert cli.main(["train", f"--config={config}", f"--config.data.root={prepared}", f"--workdir={run}"]) == FINISHED
    assert (run / "damaged" / str(first)).is_dir() and losses(run) == losses(undisturbed)


def test_a_selected_checkpoint_that_is_damaged_at_the_end_is_set_aside(undisturbed, tiny_config, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    selected = json.loads((run / "results.json").read_text())["selected"]["step"]
    for name in ("results.json", "predictions.parquet"):
        (run / name).unlink()
    damage(run / "checkpoints" / str(selected) / "params")
    with pytest.raises(DamagedCheckpoint, match=f"lies in {run}/damaged now"):
        train(tiny_config, run)
    assert train(tiny_config, run) == FINISHED
    assert json.loads((run / "results.json").read_text())["selected"]["step"] != selected


def test_a_start_beside_a_run_that_is_about_to_end_leaves_its_checkpoint(
    undisturbed, tiny_config, tmp_path, monkeypatch
):
    run = unfinished(undisturbed, tmp_path)

    def locked_by_the_other(*arguments):
        shutil.copytree(undisturbed / "checkpoints" / "20", run / "checkpoints" / "20")
        return lock(*arguments)

    monkeypatch.setattr("vit_nabirds.training.train.lock", locked_by_the_other)
    with pytest.raises(TransientError, match="another process has just trained in"):
        train(tiny_config, run)
    assert steps_of(run)[-1] == 20 and not (run / "left").exists()


def test_an_evaluation_that_was_not_written_is_made_again(undisturbed, tiny_config, tmp_path):
    run = unfinished(undisturbed, tmp_path)
    best = json.loads((undisturbed / "results.json").read_text())["selected"]["step"]
    assert best in steps_of(run)[:-1]
    selection = Selection.read(run, steps_of(run), "val/accuracy")
    del selection.evaluations[best]
    selection.write()
    assert train(tiny_config, run) == FINISHED
    assert json.loads((run / "results.json").read_text())["selected"]["step"] == best


def test_the_only_checkpoint_is_not_set_aside(undisturbed, tiny_config, tmp_path):
    run = unfinished(undisturbed, tmp_path)
    for step in steps_of(run)[:-1]:
        shutil.rmtree(run / "checkpoints" / str(step))
    damage(run / "checkpoints" / "15" / "training")
    for _ in range(2):
        with pytest.raises(UserError, match="checkpoints/15 is damaged, and there is no other: delete it to start"):
            train(tiny_config, run)


def test_a_damaged_checkpoint_stays_where_another_process_trains_and_where_it_is_of_another_run(undisturbed, tmp_path):
    run = unfinished(undisturbed, tmp_path)
    folder = run / "checkpoints" / "15"
    with lock(run / "lock", "not this one"):
        with pytest.raises(UserError, match="15 is damaged.* Another process works in"):
            with damage_set_aside(run, is_locked=False):
                raise DamagedCheckpoint(folder)
    with pytest.raises(DamagedCheckpoint):
        with damage_set_aside(tmp_path / "other"):
            raise DamagedCheckpoint(folder)
    assert folder.is_dir() and not (tmp_path / "other").exists()


def test_an_evaluation_of_a_damaged_selection_says_what_it_used(undisturbed, tmp_path, capsys, caplog):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    selected = json.loads((run / "results.json").read_text())["selected"]["step"]
    damage(run / "checkpoints" / str(selected) / "params")
    assert evaluate(run) == 0
    assert f"checkpoints/{selected} is damaged: the best of the others is used instead" in caplog.text
    assert json.loads(capsys.readouterr().out)["step"] != selected


def damage(part: Path) -> None:
    """Change a bit of a file, or of the largest file of a part of a checkpoint."""
    file = part if part.is_file() else max(part.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


DAMAGED_LINES = [
    b"half a li", b"", b"\xff\xfe", b"7", b"[1]", b"null", b'"step"', b"{}", b'{"step": true}', b'{"step": 1.5}',
    b'{"step": -1}', b'{"step": 1, "train/loss": "1"}', b'{"step": 1, "train/loss": NaN}',
    b'{"step": 1, "time": 1e999}',
    b'{"step": 1, "epoch": 1' + 400 * b"0" + b"}", b"[" * 100_000, b'{"step": 1' + 5000 * b"0" + b"}",
]  # fmt: skip


def test_lines_of_the_log_that_cannot_be_read_are_set_aside(undisturbed, tiny_config, tmp_path, caplog):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], *(line + b"\n" for line in DAMAGED_LINES), *lines[1:]]))
    shutil.rmtree(run / "checkpoints" / "20")
    assert train(tiny_config, run) == FINISHED and losses(run) == losses(undisturbed)
    assert (run / "metrics.damaged").read_bytes() == b"".join(line + b"\n" for line in DAMAGED_LINES)
    assert f"{len(DAMAGED_LINES)} line(s) could not be read and are in metrics.damaged now" in caplog.text


def test_no_flipped_bit_in_the_log_stops_a_reader(undisturbed, tmp_path):
    whole, file = (undisturbed / "metrics.jsonl").read_bytes()[:500], tmp_path / "metrics.jsonl"
    for place in range(len(whole)):
        for bit in range(8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            values, damaged = split_metrics(file)
            assert whole.count(b"\n") - 2 < len(values) + len(damaged) < whole.count(b"\n") + 2


def test_a_workdir_in_which_another_process_trains_is_refused(undisturbed, tiny_config, tmp_path):
    run = unfinished(undisturbed, tmp_path)
    with lock(run / "lock", "not this one"):
        with pytest.raises(UserError, match="another process trains in .*/run right now"):
            train(tiny_config, run)
    assert train(tiny_config, run) == FINISHED
