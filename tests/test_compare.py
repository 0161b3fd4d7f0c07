"""`compare`: one table of runs, whatever state they are in."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from vit_nabirds import cli
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.runs.summary import read_summary


@pytest.fixture(autouse=True)
def our_log(monkeypatch):
    """Undoes what a command in this process does to the package's log."""
    log = logging.getLogger("vit_nabirds")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


def change(file: Path, **values) -> None:
    """Fields of JSON, by name with __ between sections."""
    content = json.loads(file.read_text())
    for name, value in values.items():
        *sections, last = name.split("__")
        section = content
        for part in sections:
            section = section[part]
        section[last] = value
    file.write_text(json.dumps(content))


def copied(run: Path, to: Path, accuracy: float | None = None, **config) -> Path:
    """A run's small files, with another test accuracy and configuration."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "compiled"))
    change(to / "config.json", **config)
    if accuracy is not None:
        change(to / "results.json", test__accuracy=accuracy)
    return to


def cut(run: Path, lines: int) -> Path:
    """The run as it was when it had logged so many lines."""
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(metrics[:lines]))
    (run / "results.json").unlink()
    return run


@pytest.fixture(scope="module")
def runs(undisturbed, tmp_path_factory) -> Path:
    """Two rates with two seeds each, and a run that is in its middle."""
    folder = tmp_path_factory.mktemp("runs")
    for rate, seed, accuracy in ((0.01, 0, 0.5), (0.01, 1, 0.7), (0.002, 0, 0.9), (0.002, 1, 0.8)):
        copied(undisturbed, folder / f"{rate},{seed}", accuracy, seed=seed, optimizer__learning_rate=rate)
    cut(copied(undisturbed, folder / "young", epochs=8.0), 14)
    change(folder / "young" / "run.json", total_steps=40)
    return folder


def compared(capfd, *arguments) -> list[str]:
    assert cli.main(["compare", *map(str, arguments)]) == 0, capfd.readouterr().err
    return capfd.readouterr().out.splitlines()


def refused(capfd, *arguments) -> str:
    assert cli.main(["compare", *map(str, arguments)]) in (1, 2)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")
    return said[0]


def first_words(lines: list[str]) -> list[str]:
    """The names of the runs in the first table."""
    start = next(number for number, line in enumerate(lines) if line.startswith("──"))
    return [line.split()[0] for line in lines[start + 1 : lines.index("")] if line[0] != " "]


def test_the_table_shows_what_differs_and_the_figures_of_each_run(runs, undisturbed, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    lines = compared(capfd, runs)
    header, line = next(line for line in lines if line.startswith("run")), next(x for x in lines if "0.002,1" in x)
    assert header.split()[:5] == ["run", "seed", "epochs", "learning_rate", "state"]
    assert line.split()[1:4] == ["1", "4", "0.002"] and "finished" in line
    results = json.loads((undisturbed / "results.json").read_text())
    low, high = results["test"]["accuracy_interval"]
    assert f"0.8000 ({low:.3f}–{high:.3f})" in line
    assert f" {results['selected']['step']}  {results['selected']['value']:.4f} (" in line


def test_a_run_in_its_middle_shows_its_step_and_the_latest_validation(runs, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    line = next(line for line in compared(capfd, runs) if line.startswith("young"))
    metrics = read_metrics(runs / "young" / "metrics.jsonl")
    latest = [line for line in metrics if "val/accuracy" in line][-1]
    assert f"step {metrics[-1]['step']} of 40" in line
    assert f" {latest['step']}  {latest['val/accuracy']:.4f} (" in line


def test_the_number_of_steps_is_known_from_any_line_of_the_log(undisturbed, tmp_path):
    run = copied(undisturbed, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for line in lines:
        (run / "metrics.jsonl").write_text(line)
        assert read_summary(run).total_steps == 20
        (run / "run.json").unlink(missing_ok=True)  # of an earlier version


def test_the_time_counts_no_pause(undisturbed, tmp_path):
    run = copied(undisturbed, tmp_path / "run")
    metrics = read_metrics(run / "metrics.jsonl")
    for line in metrics:  # 8 images a step
        line["time"] += 3600 * line["step"]
        line |= {"train/images_per_second": 16.0} if "train/loss" in line else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    assert read_summary(run).seconds == pytest.approx(20 * 8 / 16)


def test_an_older_run_has_the_defaults_of_fields_that_it_lacks(undisturbed, tmp_path, capfd):
    copied(undisturbed, tmp_path / "new")
    config = json.loads((copied(undisturbed, tmp_path / "old") / "config.json").read_text())
    for name in ("lora", "ema_decay", "loss"):
        del config[name]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    lines = compared(capfd, tmp_path)
    assert first_words(lines) == ["new", "old"] and not any("ema" in line or "rank" in line for line in lines)


DAMAGED = {
    "config.json": ["", "[]", '{"batch_size": -1}', '{"nonsense": 1}', "\x00", "{" * 10_000],
    "results.json": ["{", "{}", '{"selected": {"step": "5"}}', '{"selected": [], "test": {}, "last": 3}', "NaN"],
}


@pytest.mark.parametrize("file, content", [(file, content) for file, texts in DAMAGED.items() for content in texts])
def test_a_damaged_file_is_named_and_the_others_are_compared(runs, tmp_path, capfd, file, content):
    run = copied(runs / "0.01,0", tmp_path / "run")
    (run / file).write_text(content)
    lines = compared(capfd, runs / "0.01,1", run)
    assert sum(" damaged " in line for line in lines) == sum(" finished " in line for line in lines) == 1
    assert f"{file} cannot be used (" in " ".join(lines)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 5, "epoch": [1, 2], "train/loss": [1]}',
        '{"step": 5, "epoch": 1e-299, "train/images_per_second": 1e-299}',
        '{"step": 100000000000000000000000000000, "epoch": 0}',
        '{"step": 5, "epoch": -1, "val/accuracy": 7, "val/examples": -3}',
        '{"step": 5, "val/accuracy": 0.5, "val/examples": 0}',
    ],
)
def test_a_log_of_nonsense_is_compared(runs, tmp_path, capfd, line):
    run = cut(copied(runs / "0.01,0", tmp_path / "run"), 0)
    (run / "metrics.jsonl").write_text(f"{line}\nnot JSON\n")
    assert any(" step " in line for line in compared(capfd, run))


def test_names_of_folders_move_no_cursor_and_format_nothing(runs, tmp_path, capfd):
    name = "[red]a\x1b[31m"
    copied(runs / "0.01,0", tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    out = "\n".join(compared(capfd, *tmp_path.iterdir()))
    for suffix in ("csv", "html"):
        assert compared(capfd, *tmp_path.iterdir(), f"--out={tmp_path}/table.{suffix}") == []
        assert r"\udcff" in (tmp_path / f"table.{suffix}").read_text()
    assert r"[red]a\x1b[31m" in out and "\x1b[31m" not in out and re.search(r"empty +not started", out)


def test_runs_are_found_below_folders_once_and_in_the_order_of_their_numbers(runs, tmp_path, capfd):
    for name in ("b/rate=0.0001", "b/rate=1e-05", "a"):
        copied(runs / "0.01,0", tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert first_words(compared(capfd, tmp_path / "b", tmp_path / "notes.txt", tmp_path)) == [
        "b/rate=1e-05",
        "b/rate=0.0001",
        "a",
    ]


def test_rows_are_sorted_by_a_column_or_field_and_those_without_it_come_last(runs, capfd):
    assert first_words(compared(capfd, runs, "--sort=test")) == ["0.01,0", "0.01,1", "0.002,1", "0.002,0", "young"]
    assert first_words(compared(capfd, "--sort=-test", runs))[::4] == ["0.002,0", "young"]
    by_rate = first_words(compared(capfd, runs, "--sort=-optimizer.learning_rate"))
    assert by_rate == ["0.01,0", "0.01,1", "young", "0.002,0", "0.002,1"]


WHERE = {
    "optimizer.learning_rate<1e-2": ["0.002,0", "0.002,1"],
    "learning_rate >= 0.01": ["0.01,0", "0.01,1", "young"],
    "seed=1": ["0.002,1", "0.01,1"],
    "seed!=0": ["0.002,1", "0.01,1"],
    "state=finished": ["0.002,0", "0.002,1", "0.01,0", "0.01,1"],
    "test>0.7": ["0.002,0", "0.002,1"],
    "augment.contrast=(0.8,1.2)": ["0.002,0", "0.002,1", "0.01,0", "0.01,1", "young"],
    "track=tensorboard": ["0.002,0", "0.002,1", "0.01,0", "0.01,1", "young"],
    "augment.flip=True": ["0.002,0", "0.002,1", "0.01,0", "0.01,1", "young"],
    "optimizer.name=adamw": ["0.002,0", "0.002,1", "0.01,0", "0.01,1", "young"],
}


@pytest.mark.parametrize("condition", WHERE)
def test_a_condition_leaves_the_runs_of_which_it_holds(runs, capfd, condition):
    assert sorted(first_words(compared(capfd, runs, f"--where={condition}"))) == WHERE[condition]


def test_all_conditions_must_hold(runs, capfd):
    assert first_words(compared(capfd, runs, "--where=seed=0", "--where=test<0.6")) == ["0.01,0"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "compare needs the workdirs of runs"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["RUNS", "--sort=tset"], "there is no column 'tset'; did you mean test?"),
        (["RUNS", "--sort=lr"], "there is no column 'lr'; did you mean optimizer.learning_rate?"),
        (["RUNS", "--where=lerning_rate<1"], "did you mean learning_rate"),
        (["RUNS", "--where=seed"], "write a field or column, one of <= >= != = < > and a value"),
        (["RUNS", "--where=seed<one"], "seed is a number like 0, and 'one' is none"),
        (["RUNS", "--where=state<finished"], "state is no number, so use = or !="),
        (["RUNS", "--where=seed=7", "--where=test>0"], "--where=seed=7 --where=test>0: of 5 runs it holds for none"),
        (["RUNS", "--out=table.txt"], "its name must end in .csv or .html"),
        (["RUNS", "--out=nowhere/table.csv"], "there is no folder"),
    ],
)
def test_a_mistake_is_one_line(runs, tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, *(str(runs) if word == "RUNS" else word for word in arguments))
    assert not any(tmp_path.iterdir())


def test_runs_that_differ_in_the_seed_alone_have_a_mean_and_a_range(runs, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    lines = compared(capfd, runs)
    means = lines[lines.index("Means over seeds, ranges in parentheses") :]
    rows = [line for line in means if line.startswith("learning_rate=")]
    assert [row.split()[0] for row in rows] == ["learning_rate=0.002", "learning_rate=0.01"]
    assert "2 (0, 1)" in rows[0] and "0.8500 (0.800–0.900)" in rows[0] and "0.6000 (0.500–0.700)" in rows[1]


@pytest.mark.parametrize("width", [60, 100])
def test_a_narrow_terminal_shows_all_of_it(runs, monkeypatch, capfd, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = compared(capfd, *runs.iterdir())
    assert max(map(len, lines)) <= width
    out = re.sub(r"\s", "", "".join(lines))
    assert "learning_rate=0.002" in out and "epochs=8" in out
    assert all(text in out for text in ("0.9000", "0.5000", "finished", "95%intervals"))


def test_without_a_terminal_it_has_100_columns(runs, monkeypatch, capfd):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert 60 < max(map(len, compared(capfd, *runs.iterdir()))) <= 100


def test_a_csv_file_has_the_runs_and_no_formulas(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    copied(runs / "0.01,0", tmp_path / "=1+1", 0.25, optimizer__rules="cls_token frozen")
    assert compared(capfd, "=1+1", runs, "--out=table.csv", "--sort=test") == []
    table = pl.read_csv(tmp_path / "table.csv")
    assert table["run"][0] == "'=1+1" and table["test"].to_list() == [0.25, 0.5, 0.7, 0.8, 0.9, None]
    assert table["optimizer.rules"][0] == "cls_token frozen" and table["optimizer.learning_rate"][4] == 0.002
    assert (table["test_low"] < table["test_high"]).sum() == 5 and table["state"][-1].startswith("step ")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["=1+1", "table.csv"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=program, args=["--no-sandbox"])


def test_a_page_escapes_what_it_shows_sorts_and_asks_for_nothing(runs, tmp_path, capfd, browser):
    hostile = "<img src=x onerror=document.title='hacked'>"
    copied(runs / "0.01,0", tmp_path / hostile, 0.25, optimizer__rules="<b>a</b> frozen")
    assert compared(capfd, tmp_path / hostile, runs, f"--out={tmp_path / 'table.html'}") == []
    page = browser.new_page(viewport={"width": 390, "height": 800})
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "table.html").as_uri())
    names = "() => [...document.querySelectorAll('table')[0].tBodies[0].rows].map(row => row.cells[0].innerText)"
    assert (
        hostile in page.evaluate(names)[0] and page.query_selector("img") is None and page.title() == "6 runs compared"
    )
    page.click("text=test accuracy >> nth=0")  # the best first
    assert page.evaluate(names)[0].endswith("0.002,0") and page.evaluate(names)[-1].endswith("young")
    page.click("text=test accuracy >> nth=0")
    assert hostile in page.evaluate(names)[0] and page.evaluate(names)[-1].endswith("young")
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # the table scrolls, the page does not
    assert asked == [(tmp_path / "table.html").as_uri()] and not said


def test_runs_are_on_the_same_photographs_by_their_fingerprint_wherever_these_lie(undisturbed, tmp_path, capfd):
    for seed in (0, 1):
        copied(undisturbed, tmp_path / f"{seed}", seed=seed, data__root=f"/scratch/job_{seed}/birds")
    said = "\n".join(compared(capfd, tmp_path))
    assert "Means over seeds" in said and "different photographs" not in said
    change(tmp_path / "1" / "run.json", fingerprint="another")
    said = "\n".join(compared(capfd, tmp_path))
    assert "Means over seeds" not in said and "different photographs" in said


def test_each_run_counts_once_and_a_folder_without_any_is_an_error(runs, undisturbed, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(runs)
    (tmp_path / "link").symlink_to(runs / "0.01,0")
    assert first_words(compared(capfd, "0.01,0", "./0.01,0", runs / "0.01,0", tmp_path / "link")) == ["0.01,0"]
    assert first_words(compared(capfd, tmp_path)) == ["link"]
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.jpg").touch()
    assert "photographs holds no run" in refused(capfd, tmp_path / "photographs")


def test_numbers_of_two_kinds_are_one_column(undisturbed, tmp_path):
    for epochs in (4, 7.5):
        copied(undisturbed, tmp_path / "runs" / str(epochs), epochs=epochs)
    assert cli.main(["compare", str(tmp_path / "runs"), f"--out={tmp_path / 'runs.csv'}"]) == 0
    assert pl.read_csv(tmp_path / "runs.csv")["epochs"].to_list() == [4, 7.5]
