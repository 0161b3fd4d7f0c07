"""The pages of runs, as a browser shows them: complete, quiet, and harmless whatever a bird or a folder is called."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from PIL import Image

from vit_nabirds import cli
from vit_nabirds.commands.predict import write_sheet
from vit_nabirds.commands.report import report
from vit_nabirds.data.thumbnails import thumbnail
from vit_nabirds.evaluation import answers as of_answers
from vit_nabirds.runs import record
from vit_nabirds.runs.record import read_record, record_start

HOSTILE = [
    "<script>hacked=1</script>",
    '"onerror="hacked=2" <img src=x onerror=hacked=3>',
    "'><svg onload=hacked=4>",
    "{{ 7*7 }}",
]
PHOTOGRAPHERS = ["<script>hacked=5</script>", '"onload="hacked=6', "Ann <b>Lee</b>", "\u202eeeL"]


@pytest.fixture(scope="module")
def hostile(undisturbed, prepared, tmp_path_factory):
    """A workdir whose species, photographers and folders have names that would run in a careless page."""
    place = tmp_path_factory.mktemp("pages")
    root = place / "<img src=x onerror=hacked=7>"
    workdir = shutil.copytree(
        undisturbed, place / "run'\"<b>", ignore=shutil.ignore_patterns("checkpoints", "compiled")
    )
    shutil.copytree(prepared, root)
    table = pl.read_parquet(root / "metadata.parquet")
    names = dict(zip(sorted(table["species_name"].unique()), HOSTILE, strict=True))
    table = table.with_columns(
        pl.col("species_name").replace(names),
        photographer=pl.int_range(pl.len()).map_elements(lambda i: PHOTOGRAPHERS[i % 4], pl.String),
    )
    table.write_parquet(root / "metadata.parquet")
    answers = pl.read_parquet(workdir / "predictions.parquet").with_columns(pl.col("label").replace(names))
    # Every third photograph is taken for the next species.
    said = [HOSTILE[(HOSTILE.index(label) + (i % 3 == 0)) % 4] for i, label in enumerate(answers["label"])]
    answers = answers.with_columns(
        predictions=pl.Series([[name, *(x for x in HOSTILE if x != name)] for name in said]),
        probabilities=pl.Series(
            [[0.5 + 0.03 * i, 0.02, 0.0, 0.0] for i in range(len(said))], dtype=pl.List(pl.Float32)
        ),
    )
    answers.write_parquet(workdir / "predictions.parquet")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["root"] = str(root)
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


@pytest.fixture(scope="module")
def page_file(hostile):
    assert cli.main(["report", f"--workdir={hostile}"]) == 0
    return hostile / "report.html"


@pytest.fixture(scope="module")
def chromium():
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium or google-chrome")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=browser)
        yield opened
        opened.close()


@pytest.fixture
def visit(chromium):
    """Opens a file as a page; nothing may fail in it, ask the network or run."""
    contexts, trouble = [], []

    def visit(file, **options):
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or trouble.append(request.url))
        page.goto(file.absolute().as_uri())
        return page

    yield visit
    assert not trouble
    for context in contexts:
        assert context.pages[0].evaluate("typeof hacked") == "undefined"
        context.close()


def photographs_in(page):
    """(photographer's line, width of the picture) of each photograph that the page shows."""
    return page.evaluate(
        """Promise.all([...document.images].map(async image => {
             await image.decode();
             const by = image.closest("figure, article").querySelector(".by");
             return [by ? by.textContent.trim() : "", image.naturalWidth];
           }))"""
    )


def test_names_that_would_run_are_shown_as_text(visit, page_file):
    page = visit(page_file)
    text = page.inner_text("body")
    for name in HOSTILE:
        assert name in text
    assert "Ann <b>Lee</b>" in text and "\\u202eeeL" in text and "<img src=x onerror=hacked=7>" in text
    assert page.evaluate("document.scripts.length") == 1 and page.locator("img[onerror], svg[onload]").count() == 0


def test_every_photograph_has_its_photographer_beside_it(visit, page_file):
    found = photographs_in(visit(page_file))
    assert len(found) >= 5 + 4  # the mistakes, and two of each pair
    known = {f"photo: {name}" for name in [*PHOTOGRAPHERS[:3], "\\u202eeeL"]}
    assert {line for line, _ in found} <= known and all(width for _, width in found)


@pytest.mark.parametrize("kind", ["report", "comparison", "sheet"])
def test_a_page_fits_a_phone_and_turns_dark(visit, page_file, comparison_file, sheet_file, kind):
    file = {"report": page_file, "comparison": comparison_file, "sheet": sheet_file}[kind]
    colours = []
    for scheme in ("light", "dark"):
        page = visit(file, viewport={"width": 390, "height": 800}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        if kind != "sheet":
            drawn = page.locator(".plots path[style*='(--one)'], .plots path[style*='(--two)']").first
            colours.append(drawn.evaluate("path => getComputedStyle(path).stroke"))
    assert len(set(colours)) == len(colours)


def test_the_table_sorts_by_the_heading_that_is_pressed(visit, page_file):
    page = visit(page_file)
    rows = lambda column: page.locator(f"table.sortable tbody td:nth-child({column})").all_inner_texts()  # noqa: E731
    assert rows(1) == sorted(HOSTILE)
    page.get_by_role("button", name="accuracy").click()
    down = [float(text.rstrip(" %")) for text in rows(3)]
    page.get_by_role("button", name="accuracy").click()
    assert down == sorted(down, reverse=True) != [float(text.rstrip(" %")) for text in rows(3)] == down[::-1]
    page.locator("table.sortable th").first.click()
    assert page.locator("table.sortable th[aria-sort]").count() == 1


def test_the_figures_are_those_of_the_results(visit, page_file, hostile):
    test = json.loads((hostile / "results.json").read_text())["test"]
    text = " ".join(visit(page_file).inner_text("body").split())
    low, high = (f"{100 * end:.1f}" for end in test["accuracy_interval"])
    assert f"{100 * test['accuracy']:.1f} % {round(test['accuracy'] * 15)} of 15 test photographs" in text
    assert f"95 % interval {low} to {high} %" in text
    level = test["accuracy_level1_interval"]
    assert f"level 1 4 {100 * test['accuracy_level1']:.1f} % {100 * level[0]:.1f} to {100 * level[1]:.1f} %" in text
    answers = pl.read_parquet(hostile / "predictions.parquet")
    right = answers["predictions"].list.first() == answers["label"]
    for name in HOSTILE:
        of_class = right.filter(answers["label"] == name)
        assert f"{name} {len(of_class)} {100 * of_class.mean():.1f} %" in text
    for field in ("optimizer.learning_rate 0.01 0.0001", "batch_size 8 128"):
        assert field in text


def test_calibration_is_the_mean_gap_between_probability_and_accuracy():
    random = np.random.default_rng(0)
    probability, right = random.uniform(0, 1, 500), random.uniform(0, 1, 500) < 0.6
    table = pl.DataFrame({"probability": probability, "right": right})
    gaps = []
    for low in np.arange(15) / 15:
        inside = (probability >= low) & (probability < low + 1 / 15)
        gaps.append(abs(probability[inside].sum() - right[inside].sum()))
    bins, error = of_answers.calibration(table)
    assert error == pytest.approx(sum(gaps) / 500) and bins["examples"].sum() == 500


def test_pairs_count_mistakes_both_ways_and_few_photographs_prove_little():
    rows = [("a", "b")] * 2 + [("b", "a")] * 2 + [("c", "a")] * 3 + [("c", "c")] * 5 + [("d", "d")] + [("e", "e")] * 30
    table = pl.DataFrame(rows, schema=["label", "predicted"], orient="row").with_columns(
        right=pl.col("label") == pl.col("predicted"), probability=0.5
    )
    assert of_answers.confused_pairs(table, 2) == [("a", "b", 2, 2), ("a", "c", 0, 3)]
    best, worst = of_answers.extremes(of_answers.by_class(table), 8)
    assert best["label"].to_list() == ["e", "c"] and worst["label"].to_list() == ["a", "b"]
    row = of_answers.by_class(table).row(by_predicate=pl.col("label") == "a", named=True)
    assert (row["correct"], row["precision"], row["mistaken_for"]) == (0, 0.0, "b")


def test_the_data_may_lie_elsewhere_and_the_starts_differ(hostile, tmp_path):
    workdir = shutil.copytree(hostile, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    root, config["data"]["root"] = config["data"]["root"], "/nowhere"
    (workdir / "config.json").write_text(json.dumps(config))
    record = json.loads((workdir / "run.json").read_text())
    record["total_steps"] *= 2  # patience has ended it
    first = record["starts"][0] | {"command": "python main.py"}
    record["starts"] = [first, first, first | {"command": "python main.py --accept_changes", "step": 15}]
    (workdir / "run.json").write_text(json.dumps(record))
    report(workdir, tmp_path / "page.html", data_root=Path(root))
    text = (tmp_path / "page.html").read_text()
    assert "<img" in text and "There are no photographs" not in text
    assert text.count("<pre>python main.py") == 2 and "from step 15:" in text


def test_without_the_data_the_page_says_so_and_has_no_photographs(hostile, tmp_path):
    workdir = shutil.copytree(hostile, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["root"] = "/nowhere"
    (workdir / "config.json").write_text(json.dumps(config))
    report(workdir, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "There are no photographs: /nowhere/metadata.parquet is missing" in text and "<img" not in text
    assert "Mistakes it was surest of" in text
    table = pl.read_parquet(workdir / "predictions.parquet")
    table.with_columns(label=pl.lit("another")).write_parquet(workdir / "predictions.parquet")
    shutil.copy(hostile / "config.json", workdir / "config.json")  # the data are of other birds
    report(workdir, tmp_path / "page.html")
    assert "<img" not in (tmp_path / "page.html").read_text()


def test_an_unfinished_run_has_a_page_of_what_is_there(visit, hostile, tmp_path):
    workdir = shutil.copytree(hostile, tmp_path / "run")
    for name in ("results.json", "run.json"):
        (workdir / name).unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:12]) + '{"step": 1')  # killed while it wrote
    report(workdir, workdir / "report.html")
    text = visit(workdir / "report.html").inner_text("body")
    assert "has not come to its end (the log has step 10)" in text and "8 validation photographs" in text
    assert "Curves" in text and "Calibration" not in text and "were not recorded" in text
    (workdir / "metrics.jsonl").unlink()
    report(workdir, workdir / "report.html")
    assert "there are no curves" in visit(workdir / "report.html").inner_text("body")


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--workdir=nowhere"], 1, "nowhere holds no run"),
        (["--workdir=RUN", "--compare=nowhere"], 1, "nowhere holds no run"),
        (["--workdir=RUN", "--out=page.txt"], 2, "--out=page.txt: its name must end in .html"),
        (["--workdir=RUN", "--out=nowhere/page.html"], 2, "there is no folder"),
        ([], 2, "report needs --workdir"),
    ],
)
def test_mistakes_are_one_line(hostile, tmp_path, monkeypatch, capfd, flags, code, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *(flag.replace("RUN", str(hostile)) for flag in flags)]) == code
    assert message in capfd.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, content", [("results.json", '{"test": 1}'), ("predictions.parquet", "x"), ("config.json", "{")]
)
def test_a_damaged_file_is_one_line(hostile, tmp_path, capfd, name, content):
    workdir = shutil.copytree(hostile, tmp_path / "run")
    (workdir / name).write_text(content)
    assert cli.main(["report", f"--workdir={workdir}"]) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert name in line


def test_a_training_records_where_and_with_what_it_ran(undisturbed):
    recorded = read_record(undisturbed)
    assert recorded.photographs == {"train": 40, "validation": 8, "test": 15} and recorded.total_steps == 20
    [start] = recorded.starts
    assert start.devices.startswith("2 x CPU") and start.versions["jax"] == jax.__version__ and start.step == 0


def test_each_start_is_recorded_with_its_command(undisturbed, tmp_path, monkeypatch):
    facts = {name: value for name, value in vars(read_record(undisturbed)).items() if name != "starts"}
    monkeypatch.setattr(sys, "argv", ["main.py", "train", "--workdir=my runs", "--config.epochs=3"])
    monkeypatch.setattr(record, "MOST_STARTS", 3)
    for step in range(5):
        record_start(tmp_path, step, jax.devices(), 1, facts)
    starts = read_record(tmp_path).starts
    assert [start.step for start in starts] == [0, 3, 4]  # the first, and the newest
    assert starts[0].command == "python main.py train '--workdir=my runs' --config.epochs=3"
    for damage in (
        '{"starts": [1]}',
        "[]",
        (tmp_path / "run.json").read_text().replace('"trained": ', '"trained": "x'),
    ):
        (tmp_path / "run.json").write_text(damage)
        assert read_record(tmp_path) is None
    record_start(tmp_path, 7, jax.devices(), 1, facts)
    assert [start.step for start in read_record(tmp_path).starts] == [7]


@pytest.fixture(scope="module")
def comparison_file(hostile, tmp_path_factory):
    """Of the run, and one that is right about three more photographs and wrong about another."""
    other = shutil.copytree(hostile, tmp_path_factory.mktemp("other") / "B&B")
    answers = pl.read_parquet(other / "predictions.parquet")
    names = answers["predictions"].to_list()
    for row in (0, 3, 6, 1):
        names[row][:2] = names[row][1::-1] if row == 1 else [answers["label"][row], names[row][0]]
    answers.with_columns(predictions=pl.Series(names)).write_parquet(other / "predictions.parquet")
    config = json.loads((other / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.02
    (other / "config.json").write_text(json.dumps(config))
    assert cli.main(["report", f"--workdir={hostile}", f"--compare={other}"]) == 0
    return hostile / "comparison.html"


def test_two_runs_stand_side_by_side(visit, comparison_file):
    page = visit(comparison_file)
    text = " ".join(page.inner_text("body").split())
    assert "B names 3 that A does not, and A 1 that B does not" in text and "+13.3 points" in text
    assert "cannot be told apart" in text  # 3 against 1
    assert "optimizer.learning_rate 0.01 0.02 0.0001" in text and "B&B" in text
    found = photographs_in(page)
    assert len(found) == 4 and all(line.startswith("photo: ") for line, _ in found)


def test_the_interval_of_a_difference_covers_what_chance_makes():
    random, covered = np.random.default_rng(1), 0
    for _ in range(300):
        one, other = random.uniform(size=(2, 200)) < [[0.8], [0.85]]
        _, low, high = of_answers.difference(pl.DataFrame({"right": one, "right_other": other}))
        covered += low <= 0.05 <= high
    assert 0.92 < covered / 300 < 0.98


@pytest.fixture(scope="module")
def sheet_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheet")
    bird = thumbnail(np.asarray(Image.effect_noise((400, 300), 90).convert("RGB")))
    answers = [
        {"file": f"{folder}/\"onerror=\"hacked=8<img src=x onerror=hacked=9>{i}.jpg", "species": HOSTILE,
         "probability": [0.9, 0.05, 0.03, 0.02], "problem": None, "box": [1, 2, 30, 40], "thumbnail": bird}
        for i in range(200)
    ]  # fmt: skip
    answers.append(
        {
            "file": f"{folder}/x.jpg",
            "species": [],
            "probability": [],
            "problem": "<b>cut",
            "box": None,
            "thumbnail": None,
        }
    )
    write_sheet(answers, folder / "birds.html", folder, 200, 1)
    return folder / "birds.html"


def test_a_contact_sheet_names_each_photograph(visit, sheet_file):
    page = visit(sheet_file)
    assert page.locator("article").count() == 201 and page.locator("article img").count() == 200
    first = page.locator("article").first.inner_text()
    assert HOSTILE[0] in first and "90 %" in first and "onerror=hacked=9>0.jpg, box 1 2 30 40" in first
    assert "<b>cut" in page.locator("article").last.text_content()
    assert sheet_file.stat().st_size < 200 * 20_000  # of noise: photographs take a third of it


def test_a_contact_sheet_of_an_archive_names_the_photographers(visit, prepared, tmp_path):
    table = pl.read_parquet(prepared / "metadata.parquet")
    path, photographer = table.select("path", "photographer").row(0)
    images = prepared / "cleaned_images"
    answer = {"file": str(images / path), "species": ["x"], "probability": [1.0], "problem": None, "box": None}
    answer["thumbnail"] = thumbnail(np.asarray(Image.open(images / path)))
    write_sheet([answer], tmp_path / "birds.html", images, 1, 0)
    assert f"photo: {photographer}" in visit(tmp_path / "birds.html").inner_text("article")
    source = prepared.parent / "archive" / "images" / table["source"][0]
    write_sheet([answer | {"file": str(source)}], tmp_path / "birds.html", source.parent, 1, 0)
    assert f"photo: {photographer}" in visit(tmp_path / "birds.html").inner_text("article")
