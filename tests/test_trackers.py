"""MLflow and Weights & Biases: a stopped run stays one run, and a server that fails is not the training's problem."""

import json
import os
import socket
import struct
import sys
import time

import pytest
from tiny_runs import FINISHED, at, crash, train

from vit_nabirds.config import Config
from vit_nabirds.config.plan import Plan
from vit_nabirds.errors import ConfigError, without_secrets
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.runs.tracker import Tracker
from vit_nabirds.runs.trackers import RunInfo, background, check
from vit_nabirds.runs.trackers.identity import Identity

os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # what is written is read back here
PLAN = Plan.of(Config.read({"data": {"root": "birds"}, "batch_size": 8, "epochs": 4.0}), 40)
LINE = {"train/loss": 1.5, "train/accuracy": 0.5}


def mlflow_runs(folder) -> list:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    experiments = client.search_experiments()
    return [(client, run) for x in experiments for run in client.search_runs([x.experiment_id])]


def wandb_records(file) -> list:
    """Of a .wandb file: blocks of 32 KiB with parts of protocol buffers, as LevelDB writes its log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, records = file.read_bytes(), 7, b"", []
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(part))
            part = b""
    return records


@pytest.fixture(scope="module")
def tracked(prepared, tmp_path_factory):
    """The workdir of a run that crashed at step 9 and went on from step 8, in a folder with MLflow's store."""
    from tiny_config import get_config

    config, workdir = get_config(), tmp_path_factory.mktemp("tracked") / "run"
    config.data.root, config.track, config.checkpoint.every = str(prepared), ("mlflow", "wandb"), "4 steps"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        with at("step 9/20", crash), pytest.raises(RuntimeError, match="died"):
            train(config, workdir, experiment="birds")
        assert train(config, workdir, experiment="birds") == FINISHED
        assert train(config, workdir, experiment="birds") == FINISHED  # which finds nothing to do
    return workdir


def test_mlflow_has_one_run_with_each_step_once(tracked):
    ((client, run),) = mlflow_runs(tracked.parent)
    assert client.get_experiment(run.info.experiment_id).name == "birds"
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    lines = [line for line in read_metrics(tracked / "metrics.jsonl") if "train/loss" in line]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(x.step, x.value) for x in history] == [(line["step"], line["train/loss"]) for line in lines]
    assert [x.step for x in client.get_metric_history(run.info.run_id, "val/accuracy")] == [5, 10, 15, 20]
    results = json.loads((tracked / "results.json").read_text())
    assert run.data.metrics["final/accuracy"] == results["test"]["accuracy"]
    assert run.data.params["optimizer.learning_rate"] == "0.01"
    names = {file.path for folder in ("", "train", "test") for file in client.list_artifacts(run.info.run_id, folder)}
    assert {"config.md", "start.md", "train/augmented.png", "test/species.png"} <= names


def test_wandb_has_one_run_with_each_step_once(tracked):
    files = sorted((tracked / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((tracked / "trackers.json").read_text())["wandb"]["id"]
    assert len(files) == 2 and {file.name for file in files} == {f"run-{identity}.wandb"}
    records = [record for file in files for record in wandb_records(file)]
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["_step"] for row in rows if "train/loss" in row] == list(range(1, 21))
    assert rows[-1]["final/accuracy"] == json.loads((tracked / "results.json").read_text())["test"]["accuracy"]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1, 0]


def test_a_run_that_goes_back_to_change_its_recipe_is_a_new_run_of_its_trackers(tmp_path):
    first = Identity(RunInfo(tmp_path, "x", 0, {}), [])
    first.keep("mlflow", "one")
    lines = [{"step": step, "train/loss": 1.0} for step in (8, 12)]
    same = Identity(RunInfo(tmp_path, "x", 8, {}), lines)
    assert same.id_of("mlflow") == "one" and same.unreported("mlflow", 12, LINE) == {"train/accuracy": 0.5}
    again = Identity(RunInfo(tmp_path, "x", 8, {}), lines[:1])  # stopped before it came to step 12
    assert again.unreported("mlflow", 12, LINE) == {"train/accuracy": 0.5} and again.unreported("mlflow", 13, LINE)
    other = Identity(RunInfo(tmp_path, "x", 8, {}, changes=1), lines)
    assert other.id_of("mlflow") is None and other.unreported("mlflow", 12, LINE) == LINE
    (tmp_path / "trackers.json").write_text('{"mlflow": 3}')
    assert Identity(RunInfo(tmp_path, "x", 8, {}), []).id_of("mlflow") is None


@pytest.mark.parametrize("server", ["refuses", "hangs"])
def test_a_server_that_fails_neither_stops_nor_stalls_a_training(tmp_path, monkeypatch, caplog, server):
    with socket.create_server(("127.0.0.1", 0)) as listening:  # and never answers
        port = listening.getsockname()[1] if server == "hangs" else 9
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bird:secret-word@127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setattr(background, "CLOSING", 2.0)
        tracker, began = Tracker(RunInfo(tmp_path, "x", 0, {}), PLAN, ("mlflow",), True), time.monotonic()
        for step in range(1, 21):
            tracker.scalars(step, LINE)
        assert time.monotonic() - began < 1
        if server == "refuses":
            while not tracker._servers["mlflow"]._has_warned:
                time.sleep(0.05)
        tracker.close()
        assert time.monotonic() - began < 30
        # Before the socket is closed, which the hanging request would notice.
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 20
    assert len([text for text in warnings if "training goes on" in text]) == (server == "refuses")
    written = "".join(file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())
    assert "secret-word" not in caplog.text + written


def test_messages_of_servers_lose_their_secrets():
    said = (
        "request to https://bird:word@host/api?api_key=abc failed, Authorization: Basic, token='xyz' at http://host/a@b"
    )
    assert without_secrets(said).count("…") == 4
    assert not any(word in without_secrets(said) for word in ("bird:word", "abc", "Basic", "xyz"))
    for said in ("Authorization: Bearer sk-abc", "train --wandb_token sk-abc --x", "get?X-Amz-Signature=sk-abc&a=b"):
        assert "sk-abc" not in without_secrets(said) and "…" in without_secrets(said)
    for said in ("http://host/a@b", "train --config=keys.py --workdir=a token"):
        assert without_secrets(said) == said


def test_which_trackers_is_a_field_of_the_configuration(monkeypatch):
    given = {"data": {"root": "birds"}}
    assert Config.read(given).track == ("tensorboard",)
    assert Config.read(given | {"track": ["mlflow", " wandb"]}).track == ("mlflow", "wandb")
    assert Config.read(given | {"track": ("mlflow,wandb",)}).track == ("mlflow", "wandb")  # of a command line
    with pytest.raises(ConfigError, match="it must be out of tensorboard, mlflow, wandb, separated by commas"):
        Config.read(given | {"track": ("comet",)})
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"mlflow is not installed: pip install mlflow-skinny"):
        check(("tensorboard", "mlflow"))


def test_wandb_without_a_key_is_one_message_before_the_training(main, tmp_path):
    environment = {name: value for name, value in main.environment().items() if not name.startswith("WANDB")}
    environment |= {"NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    done = main(*main.tiny, "--config.track=wandb", "--workdir=run", env=environment)
    assert done.returncode == 2 and "no key for its server: run `wandb login` once" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
