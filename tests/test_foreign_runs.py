"""Workdirs that others have made or damaged, and what a run writes for others to read."""

import json
import logging
import os
import shutil

import numpy as np
import pytest

from vit_nabirds import cli
from vit_nabirds.commands.export import export
from vit_nabirds.errors import UserError, message_of
from vit_nabirds.evaluation.card import model_card
from vit_nabirds.files import crc32_of
from vit_nabirds.runs.loading import open_run

DEEP = "[" * 100_000


@pytest.fixture
def workdir(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "run")


def edit(file, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def sealed(fields: dict) -> None:
    """With the checksum of what it holds now, as a forger would write it."""
    fields.pop("crc32", None)
    fields["crc32"] = crc32_of(fields)


def edit_metadata(workdir, change) -> None:
    """Of every checkpoint."""
    for folder in (workdir / "checkpoints").glob("[0-9]*"):
        edit(folder / "_CHECKPOINT_METADATA", lambda x: (change(x["custom_metadata"]), sealed(x["custom_metadata"])))


FORGED = {
    "depth of a billion": lambda x: x["architecture"].update(num_layers=10**9),
    "an argument of the program": lambda x: x["architecture"].update(rngs=1),
    "no species": lambda x: x.update(species=[]),
    "species that are none": lambda x: x.update(species=[1, 2, 3, 4]),
    "no spread": lambda x: x["normalization"].update(std=[0, 0, 0]),
    "a fingerprint with Markdown": lambda x: x.update(fingerprint="`\n# <script>"),
    "a section that is none": lambda x: x["config"].update(data=5),
    "a field with parts": lambda x: x["config"].update(seed={"x": 1}),
    "a type": lambda x: x["config"].update(compute_dtype=[]),
    "a number of devices": lambda x: x["config"].update(cpu_devices=10**9),
    "arrays that are none": lambda x: x.update(arrays=[]),
    "arrays of nothing": lambda x: x["arrays"].update(params={"classifier/bias": []}),
    "nothing": lambda x: x.clear(),
}


@pytest.mark.parametrize("case", FORGED)
def test_metadata_that_somebody_has_forged_are_refused_in_a_line(workdir, case):
    edit_metadata(workdir, FORGED[case])
    with pytest.raises(UserError) as raised:
        open_run(workdir)
    assert len(message_of(raised.value)) < 1000


DAMAGE = {
    "config.json": [DEEP, "{", "[]", '{"cpu_devices": 1e999}', '{"data": {"root": "x"}, "cpu_devices": 1000000000}'],
    "selection.json": [DEEP, "{", "[]", "9" * 5000, '{"crc32": 1}'],
    "metrics.jsonl": [DEEP, "NaN\n"],
    "results.json": [DEEP],
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_run_with_damaged_files_is_opened_or_refused_in_a_line(workdir, file):
    for content in DAMAGE[file]:
        (workdir / file).write_text(content)
        try:
            assert open_run(workdir).params
        except UserError as error:
            assert file == "config.json" and "config.json is damaged" in str(error) and len(str(error)) < 1000


DESCRIPTIONS = {
    "depth": DEEP, "list": "[]", "cut": "{", "no time": '{"commit_timestamp_nsecs": "x"}', "metrics": '{"metrics": 5}',
    "fraction": '{"commit_timestamp_nsecs": 9e99}', "far future": f'{{"commit_timestamp_nsecs": {10**26}}}',
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_checkpoints_that_nobody_can_describe_are_refused_in_a_line(workdir, case):
    for folder in (workdir / "checkpoints").glob("[0-9]*"):
        (folder / "_CHECKPOINT_METADATA").write_text(DESCRIPTIONS[case])
    with pytest.raises(UserError, match="_CHECKPOINT_METADATA is not what this program writes|is damaged") as raised:
        open_run(workdir)
    assert len(message_of(raised.value)) < 1000


@pytest.fixture
def said(capfd):
    """Runs a command in this process: its exit code, and all that it says."""
    log = logging.getLogger("vit_nabirds")
    before = log.handlers[:], log.level, log.propagate
    yield lambda *arguments: (cli.main(list(map(str, arguments))), "".join(capfd.readouterr()))
    log.handlers[:], log.level, log.propagate = before


def test_what_is_quoted_of_a_forged_run_is_short(workdir, said):
    edit_metadata(workdir, lambda x: x["config"].update({"\x1b[2J" * 10**6: 1}))
    code, message = said("export", f"--workdir={workdir}", f"--out={workdir}/out")
    assert code == 1 and "unknown field" in message and len(message) < 1000 and "\x1b" not in message


def test_names_of_classes_break_nothing_that_is_exported(workdir, tmp_path):
    names = ["<script>alert(1)</script>", "``` | a |\n# b", "\x1b]0;title\x07", "\u202egnp.bird"]

    def rename(fields):
        fields["species"] = names
        fields["config"]["model"]["pretrained"] = "`<b>\n\n# x\x1b[2J"

    edit_metadata(workdir, rename)
    edit(workdir / "config.json", lambda x: x["model"].update(pretrained="`<b>\n\n# x\x1b[2J"))
    run = open_run(workdir)
    assert run.metadata.species == [
        "<script>alert(1)</script>",
        "``` | a |\\n# b",
        "\\x1b]0;title\\x07",
        "\\u202egnp.bird",
    ]
    card = model_card(run, '<i>"bird\x1b[2J"</i>')
    plain = model_card(open_run(workdir), "bird")
    assert "\x1b" not in card and "from `'<b>\\n\\n# x\\x1b[2J`, and" in card
    assert [line[:3] for line in card.splitlines()] == [line[:3].replace("# b", "# &") for line in plain.splitlines()]
    export(workdir, tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    assert config.isascii() and json.loads(config)["id2label"]["1"] == "``` | a |\\n# b"


def test_pictures_are_captioned_whatever_a_class_is_called():
    from vit_nabirds.errors import visible
    from vit_nabirds.runs.pictures import draw_row

    names = [visible(name) for name in ("a\nb", "x" * 1000, "\x1b", "\u202ea", "\ud800")]
    images = np.zeros((len(names), 16, 16, 3), np.float32)
    assert draw_row(images, [(name, name) for name in names]).ndim == 3


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "PASSWORD")


def test_no_secret_of_the_environment_is_written_or_said(main, said, tmp_path, monkeypatch):
    secrets = {name: f"secret-of-{name.lower()}-{os.getpid()}" for name in SECRETS}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    workdir = f"--workdir={tmp_path / 'run'}"
    commands = {
        ("train", *main.tiny): 0,
        ("evaluate",): 0,
        ("export", f"--out={tmp_path / 'out'}"): 0,
        ("train", *main.tiny, "--config.seed=1"): 1,  # another run than the workdir's
    }
    for arguments, expected in commands.items():
        code, words = said(*arguments, workdir)
        assert code == expected, words
        assert not [name for name, value in secrets.items() if value in words]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"metrics.jsonl", "results.json", "README.md"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], file
