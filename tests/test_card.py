"""The model card of an export as the Hub reads it, and the upload: to a server that speaks the Hub's protocol."""

import base64
import json
import os
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load

from vit_nabirds import cli
from vit_nabirds.commands.export import export
from vit_nabirds.evaluation.card import model_card
from vit_nabirds.models.pretrained.hub import check_upload
from vit_nabirds.runs.loading import open_run


def test_the_hub_reads_what_the_model_is_and_was_measured_at(undisturbed, prepared):
    test = json.loads((undisturbed / "results.json").read_text())["test"]
    data = ModelCard(model_card(open_run(undisturbed), "my birds")).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert data.datasets == [prepared.name] and data.metrics == ["accuracy"] and "birds" in data.tags
    assert data.license is data.base_model is None  # random weights
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {
        name: round(test[name], 4) for name in ("accuracy", "top5_accuracy", "mean_class_accuracy")
    }  # fmt: skip
    assert {(result.dataset_name, result.dataset_split) for result in data.eval_results} == {(prepared.name, "test")}


def test_a_checkpoint_that_was_not_scored_has_no_figures_in_its_card(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run" / "selection.json").unlink()
    card = model_card(open_run(tmp_path / "run"), "birds")
    assert ModelCard(card).data.eval_results is None and "not evaluated at this step" in card


CARD = "---\nlicense: apache-2.0\nbase_model: google/vit-base-patch16-224\n---\n# Weights\n"


@pytest.mark.parametrize(
    "card, licence, base",
    [
        (CARD, "apache-2.0", "google/vit-base-patch16-224"),
        ("---\nlicense: mit\n---\n", "mit", None),
        ("---\nlicense: 'x\n\n# <b>'\nbase_model: [a, b]\n---\n", None, None),
        ("---\n{{{\n---\n", None, None),
        ("# No front matter", None, None),
        (None, None, None),
    ],
)
def test_licence_and_base_are_those_of_the_weights_that_a_run_began_with(undisturbed, tmp_path, card, licence, base):
    """Through a run that began with another run."""
    weights, between = tmp_path / "weights", shutil.copytree(undisturbed, tmp_path / "between")
    weights.mkdir()
    if card:
        (weights / "README.md").write_text(card)
    for workdir, pretrained in ((between, weights), (run := shutil.copytree(between, tmp_path / "run"), between)):
        config = json.loads((workdir / "config.json").read_text())
        config["model"]["pretrained"] = str(pretrained)
        (workdir / "config.json").write_text(json.dumps(config))
    text = model_card(open_run(run), "birds")
    data = ModelCard(text).data
    assert (data.license, data.base_model) == (licence, base)
    assert f"`{licence}`, that of the weights" in text if licence else "state none. Find out before" in text


def test_a_model_of_the_hub_is_the_base(undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["pretrained"] = "org/some-vit@refs-pr-1"
    (run / "config.json").write_text(json.dumps(config))
    card = model_card(open_run(run), "birds")
    assert ModelCard(card).data.base_model == "org/some-vit" and "from `org/some-vit@refs-pr-1`" in card


def test_no_path_of_this_machine_is_exported(undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "a run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["pretrained"] = str(tmp_path / "weights")
    (run / "config.json").write_text(json.dumps(config))
    export(run, tmp_path / "out")
    private = [str(tmp_path), str(undisturbed), config["data"]["root"], str(Path.home()) + "/", socket.gethostname()]
    for file in (tmp_path / "out").iterdir():
        assert not [text for text in private if text.encode() in file.read_bytes()], file


class Hub(BaseHTTPRequestHandler):
    """What an upload asks of the Hub. `server.files` are those of the commit, `server.said` the requests."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_token-of-the-test"
        self.server.said.append(self.path)
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": f"{url}/org/birds"}, 403 if self.server.refuses else 200)
        if self.path == "/api/validate-yaml":
            self.server.card = json.loads(body)["content"]
            return self.answer({"warnings": [], "errors": []})
        if self.path == "/api/models/org/birds/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in files]
            files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(files, modes, strict=True)]
            return self.answer({"files": files})
        if self.path == "/org/birds.git/info/lfs/objects/batch":
            objects = [x | {"actions": {"upload": {"href": f"{url}/{x['oid']}"}}} for x in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        assert self.path == "/api/models/org/birds/commit/main"
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
        self.answer({"commitUrl": f"{url}/org/birds/commit/1", "commitOid": "1", "success": True})

    def do_PUT(self):
        self.server.objects[self.path[1:]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def answer(self, value: dict, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.said, server.files, server.objects, server.refuses = [], {}, {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(main, undisturbed, port):
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": "hf_token-of-the-test", "HF_HUB_OFFLINE": "0"}
    return main(
        "export", f"--workdir={undisturbed}", "--out=my-birds", "--push=org/birds", env=main.environment() | hub
    )


def test_an_export_is_uploaded(main, undisturbed, hub, tmp_path):
    done = pushed(main, undisturbed, hub.server_port)
    assert done.returncode == 0 and "/org/birds" in done.stderr, done.stderr
    assert hub.created["name"] == "birds" and hub.created["organization"] == "org" and hub.created["private"]
    assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "my-birds").iterdir()}
    assert load(hub.files["model.safetensors"]).keys() >= {"classifier.weight"}
    assert ModelCard(hub.card).data.model_name == "org/birds" and 'model="org/birds"' in hub.card


@pytest.mark.parametrize("trouble", ["no right", "no network"])
def test_an_upload_that_fails_is_one_message_and_the_folder_stays(main, undisturbed, hub, tmp_path, trouble):
    hub.refuses, port = True, hub.server_port
    if trouble == "no network":
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
    done = pushed(main, undisturbed, port)
    *_, written, message = done.stderr.splitlines()
    assert done.returncode == 1 and "my-birds holds the checkpoint of step" in written, done.stderr
    assert message.startswith("error: my-birds is written, but could not be uploaded as org/birds (")
    assert "run `hf upload --private org/birds my-birds`" in message and "hf_token-of" not in done.stderr
    assert (tmp_path / "my-birds" / "README.md").exists()


def test_without_a_token_nothing_is_written(undisturbed, tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert cli.main(["export", f"--workdir={undisturbed}", f"--out={tmp_path / 'x'}", "--push=org/birds"]) == 1
    assert "needs a token" in capfd.readouterr().err and not os.listdir(tmp_path)
    with pytest.raises(cli.ConfigError, match="give the id of a model on the Hub, ORG/NAME"):
        check_upload("birds")
