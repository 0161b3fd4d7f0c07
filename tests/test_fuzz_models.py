"""What strangers may write into the files and flags that these rooms read ends in one clear error, or in a valid value.

FUZZ_CASES is the number of cases of each test.
"""

import copy
import dataclasses
import json
import math
import os
import shutil
import struct
import tempfile
import unicodedata
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from checkpoints import save_tiny
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from vit_nabirds import cli
from vit_nabirds.commands import train as train_command
from vit_nabirds.config import Config
from vit_nabirds.config.durations import Duration, StepRange
from vit_nabirds.config.fields import default, fields, flat, with_defaults
from vit_nabirds.config.json_files import read_object
from vit_nabirds.config.path_rules import PathRules
from vit_nabirds.config.plan import Plan
from vit_nabirds.errors import LONGEST, ConfigError, UserError, message_of, shown, visible
from vit_nabirds.files import crc32_of
from vit_nabirds.models.limits import problem_of
from vit_nabirds.models.normalization import RANGES
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.models.pretrained.hf_config import DEFAULTS, PARTS, architecture_of, read_config
from vit_nabirds.models.pretrained.names import mapping
from vit_nabirds.models.pretrained.processor import read_processor
from vit_nabirds.models.pretrained.tensors import read_tensors
from vit_nabirds.runs.checkpoints import Metadata
from vit_nabirds.runs.metrics import read_metrics
from vit_nabirds.runs.selection import EVALUATION, TEST, Selection

CASES = int(os.environ.get("FUZZ_CASES", 150))
fuzz = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

NASTY = st.sampled_from([
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 10**18, 2**63, 10**400, -(10**30), 0.5, -0.0, 1e-320, 1e308, -1e308,
    math.nan, math.inf, -math.inf, "", "16", "None", "nan", "\x1b[2J", "\u202egnp", "\ud800", "\0", "../x",
    "/etc/passwd", "x" * 20_000,
    [], {}, [[]], [0, 0, 0], [1, 2, 3], {"": 0}, {"height": 16, "width": 16}, {"shortest_edge": -16},
])  # fmt: skip
SCALAR = st.one_of(NASTY, st.integers(), st.floats(), st.text(max_size=20), st.booleans())
ANYTHING = st.one_of(
    SCALAR,
    st.recursive(
        SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
)  # fmt: skip
BYTES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([
        b"", b"{", b"[]", b"null", b"NaN", b'{"a": NaN}', b'{"a": -Infinity}', b"{}", b'"x"', b"1" * 5000,
        b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'{"\\ud800": 1}', b'{"a": 1e999}', b"\xef\xbb\xbf{}",
    ]),
)  # fmt: skip


@contextmanager
def only_user_errors():
    """Anything but a UserError goes on, and what it says is one line for a terminal."""
    try:
        yield
    except UserError as error:
        check_message(message_of(error))


def check_message(message: str) -> None:
    assert 0 < len(message) <= 20 * LONGEST
    assert not [c for c in message if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")], message
    message.encode()


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def changed(original: dict, paths: st.SearchStrategy, most: int = 3) -> st.SearchStrategy:
    """The object with a few of its values, or of new ones, made something else."""

    def change(changes: list) -> dict:
        value = copy.deepcopy(original)
        for path, new in changes:
            *parents, last = path
            place = value
            for name in parents:
                place = place.setdefault(name, {}) if isinstance(place, dict) else {}
            if isinstance(place, dict):
                place[last] = copy.deepcopy(new)  # of the strategy, which is drawn from again
        return value

    return st.lists(st.tuples(paths, ANYTHING), min_size=1, max_size=most).map(change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return folder


@contextmanager
def another(folder: Path, **contents: bytes):
    """A folder like that one, with other contents of some files: config for config.json."""
    with tempfile.TemporaryDirectory() as name:
        for file in folder.iterdir():
            Path(name, file.name).write_bytes(file.read_bytes())
        for stem, content in contents.items():
            Path(name, f"{stem}.json").write_bytes(content)
        yield Path(name)


# Text for messages


@fuzz
@given(st.one_of(ANYTHING, st.text(), st.binary(), st.tuples(ANYTHING)), st.integers(20, 300))
@example("\x1b]0;title\x07\u202e\u2028\ud800\n" * 10_000, 200)
@example(10**5000, 200)
@example({"a": [{"b": "x" * 10_000}]}, 200)
def test_what_is_quoted_is_short_and_visible(value, most):
    text = shown(value, most)
    assert len(text) <= most
    text.encode()
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not set(text) & set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200e\u200f\u061c")


@fuzz
@given(st.text(alphabet=st.characters()))
def test_every_message_is_one_line_of_visible_text(text):
    assume(text)
    check_message(message_of(UserError(text)))
    assert visible(visible(text)) == visible(text)


# Configuration

NAMES = [name for name, _ in fields()]
SECTIONS = sorted({name.partition(".")[0] for name in NAMES if "." in name})


def check_config(config: Config) -> None:
    """Every value is of its field's type, and finite."""
    for name, field in fields():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        assert value is None and field.default is None or type(value) in _types_of(field), (name, value)
        if isinstance(value, float | int):
            assert math.isfinite(value), name
    as_json(config.to_dict())
    assert Config.read(with_defaults(json.loads(as_json(config.to_dict())))) == config
    for images in (1, 1000):
        try:
            plan = Plan.of(config, images)
        except ConfigError:
            continue
        assert plan.total_steps >= 1 and isinstance(plan.epoch(1), float) and plan.evaluates(plan.total_steps)
        plan.saves(1), plan.logs(1)


def _types_of(field: dataclasses.Field) -> tuple:
    kind = field.metadata["kind"] or type(field.default)
    return (float, int) if kind is float else (kind,)


PATHS = st.one_of(
    st.sampled_from([tuple(name.split(".")) for name in NAMES]),
    st.sampled_from([(name,) for name in SECTIONS]),
    st.tuples(st.sampled_from([*NAMES, "x"]), st.text(max_size=5)),
    st.tuples(st.text(max_size=5)),
)


@fuzz
@given(changed(default().to_dict() | {"data": default().to_dict()["data"] | {"root": "x"}}, PATHS))
@example({"data": 5})
@example({"seed": {"x": 1}})
@example({"data": {"root": "x"}, "optimizer": {"clip_norm": None}})
@example({"data": {"root": "x"}, "optimizer": {"learning_rate": math.nan}})
@example({"data": {"root": "x"}, "batch_size": 1.5})  # was accepted
@example({"data": {"root": "x"}, "augment": {"flip": "no"}})  # was accepted
@example({"data": {"root": 5}})  # was accepted
@example({"data": {"root": "x"}, "augment": {"area": "12"}})
@example({"data": {"root": "x"}, "augment": {"gamma": [0.5, 10**400]}})
@example({"data": {"root": "x"}, "profile": None})  # was accepted
@example({"data": {"root": "x"}, "trainable": "(" * 5000})
@example({"data": {"root": "x"}, "checkpoint": {"every": "9" * 4000 + " minutes"}})
def test_a_stored_configuration_is_valid_or_refused(values):
    with only_user_errors():
        check_config(Config.read(with_defaults(values)))


def test_a_configuration_that_is_nested_deeply_is_refused():
    values = {}
    for _ in range(900):
        values = {"x": values}
    with pytest.raises(ConfigError, match="unknown field"):
        with_defaults(values)
    assert flat(values)


TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from([
        "None", "nan", "inf", "1e400", "-1", "", "(1,2", "(nan,nan)", "[1,2]", "{}", "True", "9" * 5000, "(" * 300,
        "1_0", "0x10", "500 steps", "1 epoch", "1-10", "9" * 40 + " epochs", "\x1b[31m", "a\nb", "'a", "lambda: 0",
    ]),
)  # fmt: skip


@fuzz
@given(st.sampled_from([*NAMES, *SECTIONS, "clip", "optimizer.name.x", "model."]), TEXTS)
@example("optimizer.clip_norm", "None")
@example("augment", "mixup")
@example("clip", "1")
@example("optimizer.name.x", "1")
@example("model", "{}")  # AttributeError
@example("data", "{'root': 5}")
@example("augment", "{'flip': {'x': 1}}")
def test_a_flag_is_a_field_with_a_valid_value_or_refused_with_exit_code_2(name, text):
    assume("\0" not in text)
    try:
        check_config(Config.read(cli.parse("train", train_command, [f"--config.{name}={text}", "--workdir=x"]).config))
    except ConfigError as error:
        message = message_of(error)
        check_message(message)
        assert error.exit_code == 2 and "object at 0x" not in message and "Traceback" not in message
        assert len(message) < 900


@fuzz
@given(st.one_of(TEXTS, ANYTHING, st.from_regex(r"\s*[0-9]{1,14}(\.[0-9]{1,14})? ?(step|epoch|minute)s?")))
@example("٣ steps")
@example("9" * 5000 + " steps")
def test_a_duration_is_an_amount_or_refused(text):
    try:
        duration = Duration.parse(text)
    except (ValueError, TypeError):
        return
    assert 0 <= duration.amount < 10**12 and duration.unit in ("step", "epoch", "minute")
    assert Duration.parse(str(duration)) == duration
    assert duration.seconds is None or math.isfinite(duration.seconds)
    steps = duration.in_steps(Fraction(1000, 7))
    assert steps is None or steps >= 0


@fuzz
@given(st.one_of(TEXTS, ANYTHING, st.from_regex(r"\A[0-9]{1,14}-[0-9]{1,14}\Z")))
@example(None)  # was taken for no steps
@example(False)
@example("1-" + "9" * 5000)
def test_a_range_of_steps_is_one_or_refused(text):
    try:
        steps = StepRange.parse(text)
    except (ValueError, TypeError):
        return
    assert steps.text == text and len(steps.steps) >= (text != "")


@fuzz
@given(st.one_of(TEXTS, st.text("ab( )[]{}*+?|;=.lrwd0123456789efrozn", max_size=40)))
@example("(" * 5000 + " frozen")
@example("a{99999999999} frozen")
@example("a lr=nan")
@example("a lr=1e999")
@example("a lr=1 lr=2")
def test_rules_for_paths_are_valid_or_refused(text):
    with only_user_errors():
        for rule in PathRules.parse(text).rules:
            assert rule.lr is None or 0 < rule.lr < math.inf
            assert rule.wd is None or 0 <= rule.wd < math.inf


# Files with JSON


@fuzz
@given(BYTES)
def test_a_file_is_an_object_or_refused(content):
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            value = read_object(Path(file.name))
        except ValueError as error:
            check_message(str(error))
            return
        assert isinstance(value, dict)


def test_a_file_that_is_large_or_no_file_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # which would be waited for
    with pytest.raises(ValueError, match="no regular file"):
        read_object(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(ValueError, match="more than 16 MiB"):
        read_object(tmp_path / "large")


# A checkpoint's config.json and preprocessor_config.json

HF = {
    family: defaults | {"model_type": family, "id2label": {"0": "a"}, "num_register_tokens": 4}
    for family, defaults in DEFAULTS.items()
}
HF_FIELDS = st.one_of(
    st.sampled_from(sorted({(name,) for fields in HF.values() for name in fields})), st.tuples(st.text(max_size=5))
)


@fuzz
@given(st.one_of(*(changed(original, HF_FIELDS) for original in HF.values())))
@example({"model_type": []})
@example({"model_type": "vit", "num_hidden_layers": 1_000_000_000})  # took memory without end
@example({"model_type": "vit", "hidden_size": 2**40, "num_attention_heads": 1})
@example({"model_type": "vit", "image_size": 16_384, "patch_size": 1})
@example({"model_type": "dinov2", "mlp_ratio": 10**400, "use_swiglu_ffn": True})  # OverflowError
@example({"model_type": "dinov2", "hidden_size": 12 * 10**400, "mlp_ratio": 4.5})  # OverflowError
@example({"model_type": "dinov2", "mlp_ratio": 1e-9})  # a width of 0 was accepted
@example({"model_type": "dinov2_with_registers", "num_register_tokens": -5})  # was accepted
@example({"model_type": "vit", "num_register_tokens": "4"})
@example({"model_type": "vit", "layer_norm_eps": 1e300})
@example({"model_type": "vit", "hidden_size": True})
@example({"model_type": "\x1b[2J" * 1_000_000})
def test_a_model_is_of_sane_sizes_or_refused(fields):
    with tempfile.TemporaryDirectory() as name:
        Path(name, "config.json").write_bytes(as_json(fields))
        with only_user_errors():
            architecture = architecture_of(read_config(Path(name)))
            assert problem_of(architecture) is None
            assert architecture["num_layers"] <= 100 and architecture["mlp_dim"] >= 1
            assert len(mapping(architecture | {"num_layers": 1}, 1)) < 40


PROCESSOR = {
    "do_resize": True, "size": 224, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False, "crop_size": 224,
    "vit_nabirds_pad_to_square": True, "vit_nabirds_crop": "box",
}  # fmt: skip
TRIPLES = st.lists(st.floats() | st.integers() | NASTY, min_size=2, max_size=4)


@fuzz
@given(
    changed(PROCESSOR, st.sampled_from([(name,) for name in PROCESSOR])),
    st.one_of(st.none(), TRIPLES),
    st.one_of(st.none(), TRIPLES),
)
@example({}, [0.5] * 3, [math.nan] * 3)  # as an object in Python: JSON cannot hold it
@example({}, [1e300] * 3, [0.5] * 3)  # was accepted
@example({}, [0.5] * 3, [1e-300] * 3)  # was accepted
@example({}, [True] * 3, [True] * 3)  # was accepted
@example({"size": True}, None, None)
@example({"size": 224 * 10**9}, None, None)  # was accepted
@example({"do_normalize": "false"}, None, None)  # was taken for true
def test_a_normalisation_is_sane_or_refused(processor, mean, std):
    given = {"image_mean": mean, "image_std": std}
    processor = processor | {name: value for name, value in given.items() if value is not None}
    with only_user_errors():
        size, found = read_processor(processor, DEFAULTS["vit"] | {"model_type": "vit"}, Path("p.json"))
        assert type(size) is int and 0 < size <= 4096 and size % 16 == 0
        for name, (least, most) in RANGES.items():
            values = getattr(found, name)
            assert len(values) == 3 and all(least <= x <= most and type(x) is not bool for x in values)
        assert min(found.std) > 0


@pytest.mark.parametrize("file", ["config", "preprocessor_config"])
@fuzz
@given(BYTES)
def test_a_checkpoint_with_other_bytes_in_a_file_is_refused(folder, file, content):
    with another(folder, **{file: content}) as other:
        with only_user_errors():
            checkpoint = open_checkpoint(str(other))
            assert file == "preprocessor_config" and checkpoint.labels


LABELS = {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e", "5": "f", "6": "g", "7": "h", "8": "i"}


@fuzz
@given(st.one_of(ANYTHING, changed(LABELS, st.sampled_from([(row,) for row in LABELS] + [("9",)]))))
@example(LABELS | {"0": "<script>\x1b]0;x\x07\u202e\ud800\n| a |"})
@example(LABELS | {"0": "x" * 10**6})
def test_labels_are_visible_text_or_refused(folder, labels):
    config = json.loads((folder / "config.json").read_text()) | {"id2label": labels}
    with another(folder, config=as_json(config)) as other:
        with only_user_errors():
            for label in open_checkpoint(str(other)).labels:
                assert label == visible(label) and len(label) <= 10_000
                label.encode()


# Weights


def stored(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "F4", "BOOL", "x", 5]),
    "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, -1, 1.5, "1"]), max_size=5),
    "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 2**40, -1]), min_size=1, max_size=3),
})  # fmt: skip
TENSOR_NAMES = st.sampled_from([
    "vit.embeddings.cls_token", "embeddings.cls_token", "classifier.weight", "classifier.kernel", "norm.scale",
    "\x1b[31m\n", "../x", "", "__metadata__", "pooler.\x1b[2J",
])  # fmt: skip


@fuzz
@given(
    st.one_of(st.dictionaries(TENSOR_NAMES | st.text(max_size=5), TENSOR, max_size=3), ANYTHING, BYTES),
    st.binary(max_size=16),
    st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
@example({"a.kernel": {"dtype": "F32", "shape": [1, 2, 1], "data_offsets": [0, 8]}}, b"0" * 8, None)  # lost an axis
@example({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}, b"0000", None)
@example({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"0000", None)
@example({}, b"", 99_000_000)
@example(
    {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(["vit.a", "a"])},
    b"0" * 8, None,
)  # fmt: skip
def test_a_file_of_tensors_is_whole_or_refused(header, data, length):
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "model.safetensors")
        file.write_bytes(stored(header, data, length))
        with only_user_errors():
            for tensor in read_tensors(Path(name)).values():
                sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
                assert math.prod(tensor.shape) * sizes.get(tensor.dtype, 0) <= len(data)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    names = ["vit.a", "a"]  # of which one would silently win
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    (tmp_path / "model.safetensors").write_bytes(stored(header, b"0" * 8))
    with pytest.raises(UserError, match="'a' is there twice"):
        read_tensors(tmp_path)


SHARDS = ["../m.safetensors", "/m.safetensors", "x/m.safetensors", "m.safetensors\0", "..", "", ".", "a" * 5000,
          "pytorch_model.bin", "weights.safetensors", "\x1b.safetensors", ".safetensors"]  # fmt: skip


@fuzz
@given(
    st.one_of(ANYTHING, st.dictionaries(st.text(max_size=5), st.one_of(st.sampled_from(SHARDS), ANYTHING), max_size=3))
)
@example({"a": []})  # TypeError
@example({"a": 5})
@example({"a": "../m.safetensors"})  # was read
def test_an_index_names_files_of_its_folder_or_is_refused(weight_map):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "inner")
        folder.mkdir()
        outside = Path(name, "m.safetensors")
        for file in (outside, folder / "weights.safetensors"):
            file.write_bytes(stored({file.stem: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000"))
        (folder / "model.safetensors.index.json").write_bytes(as_json({"weight_map": weight_map}))
        with only_user_errors():
            assert read_tensors(folder).keys() <= {"weights"}


def test_links_of_the_hubs_cache_are_followed_and_others_are_not(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        (blobs / f"hash-of-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    (tmp_path / "link").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "link"):
        checkpoint = open_checkpoint(str(place))
        assert checkpoint.load(checkpoint.architecture, checkpoint.labels)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match="is a link to a file that is not of this checkpoint"):
        open_checkpoint(str(snapshot))


def test_weights_that_are_a_pipe_or_a_link_to_itself_are_none(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(UserError, match="has no .*safetensors"):
        read_tensors(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_nothing_is_unpickled(folder, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "model.pt", "flax_model.msgpack", "tf_model.h5", "optimizer.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for read in (pickle.load, pickle.loads):
        monkeypatch.setattr(pickle, read.__name__, lambda *_, **__: pytest.fail("something was unpickled"))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.load(checkpoint.architecture, checkpoint.labels)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled"):
        open_checkpoint(str(tmp_path))
    assert not (tmp_path / "exploded").exists()


def test_a_value_that_is_too_large_for_float32_is_refused(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.bias"] = np.full_like(tensors["classifier.bias"], 1e300, dtype="float64")
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="'classifier.bias' has values that are not finite"):
        checkpoint.load(checkpoint.architecture, checkpoint.labels)


# A run's own files

ARCHITECTURE = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32, "pool": "cls",
}  # fmt: skip
METADATA = {
    "config": {"data": {"root": "birds"}, "model": {"pretrained": ""}}, "architecture": ARCHITECTURE,
    "species": ["a", "b"], "normalization": {"mean": [0.5] * 3, "std": [0.5] * 3}, "fingerprint": "0123456789abcdef",
    "crop": "box", "base": None, "history": [{"step": 1, "changed": {}}],
}  # fmt: skip
METADATA_PATHS = st.one_of(
    st.sampled_from([(name,) for name in METADATA]),
    st.sampled_from([("architecture", name) for name in (*PARTS, *ARCHITECTURE)]),
    st.tuples(st.sampled_from(["architecture", "normalization", "config"]), st.text(max_size=5)),
    st.sampled_from(
        [("normalization", "std"), ("normalization", "mean"), ("config", "data"), ("config", "data", "root")]
    ),
)


@fuzz
@given(changed(METADATA, METADATA_PATHS))
@example(METADATA)
@example(METADATA | {"architecture": ARCHITECTURE | {"num_layers": 10**9}})
@example(METADATA | {"architecture": ARCHITECTURE | {"rngs": 1}})
@example(METADATA | {"species": ["\x1b[2J", "b"]})
@example(METADATA | {"species": {"a": 1}})
@example(METADATA | {"normalization": {"mean": [0.5] * 3, "std": [0.0] * 3}})
@example(METADATA | {"fingerprint": "`<b>"})
@example({})
def test_metadata_of_a_checkpoint_are_valid_or_refused(values):
    with only_user_errors():
        found = Metadata.from_json(values)
        assert problem_of(PARTS | found.architecture) is None
        assert found.species and all(name == visible(name) for name in found.species)
        assert min(found.normalization.std) > 0
        check_config(Config.read(found.config))


LINE = {"step": 1, "epoch": 0.5, "time": 1.0, "train/loss": 1.5}


@fuzz
@given(
    st.lists(
        st.one_of(BYTES, changed(LINE, st.sampled_from([(name,) for name in LINE] + [("x",), ("a/b",)])).map(as_json)),
        max_size=4,
    )
)
@example([b'{"step": 1, "train/loss": NaN}'])
@example([b'{"step": true}', b'{"step": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}"])
def test_lines_of_metrics_are_numbers_or_left_out(lines):
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(line.replace(b"\n", b" ") + b"\n" for line in [*lines, as_json(LINE)]))
        file.flush()
        found = read_metrics(Path(file.name))
        assert found[-1] == LINE
        for line in found:
            assert line["step"] >= 0 and all(type(x) in (int, float) and math.isfinite(x) for x in line.values())


OF_VALIDATION = sorted(f"val/{name}" for name in EVALUATION)
SELECTION = {
    "metric": "val/accuracy", "evaluations": {str(step): dict.fromkeys(OF_VALIDATION, 0.5) for step in (1, 2)},
    "tests": {"2": dict.fromkeys(TEST, 0.5) | {"accuracy_interval": [0.1, 0.9]}}, "unknown": [1],
}  # fmt: skip
SELECTION_PATHS = st.one_of(
    st.sampled_from([(name,) for name in SELECTION]),
    st.tuples(st.sampled_from(["evaluations", "tests"]), st.sampled_from(["1", "2", "-1", "x", "٣", "9" * 5000])),
    st.tuples(
        st.just("evaluations"),
        st.sampled_from(["1", "2"]),
        st.sampled_from([*OF_VALIDATION, "x"]),
    ),
    st.tuples(st.just("tests"), st.just("2"), st.sampled_from([*sorted(TEST), "x"])),
)


@fuzz
@given(st.one_of(changed(SELECTION, SELECTION_PATHS), ANYTHING.filter(lambda x: isinstance(x, dict))), st.booleans())
@example(SELECTION, True)
@example(SELECTION | {"evaluations": {"1": 5}}, True)
@example(SELECTION | {"evaluations": {"1": {"val/accuracy": 0.5}, "2": {"val/accuracy": 0.5}}}, True)  # KeyError
@example(SELECTION | {"evaluations": {"1": {"val/accuracy": "high"}}}, True)  # TypeError in `best`
@example(SELECTION | {"tests": {"2": {"accuracy": 0.5}}}, True)  # KeyError in `export`
@example(SELECTION | {"unknown": 5}, True)
def test_a_selection_is_valid_or_all_is_unknown(content, is_checked):
    with tempfile.TemporaryDirectory() as name:
        crc32 = {"crc32": crc32_of(content)} if is_checked else {}
        Path(name, "selection.json").write_bytes(as_json(content | crc32))
        Path(name, "predictions.parquet").touch()
        found = Selection.read(Path(name), [1, 2], "val/accuracy")
        assert set(found.unknown) <= {1, 2} and all(figures.keys() >= TEST for figures in found.tests.values())
        best = found.best([1, 2])
        assert best in (None, 1, 2) and set(found.keep([1, 2])) <= {1, 2} and found.evaluations_since_best >= 0
        if best and 2 in found.tests and best in found.tests:
            found.results(best, 2)
        assert isinstance(found.checksum, int)
        found.write()
        assert Selection.read(Path(name), [1, 2], "val/accuracy").evaluations == found.evaluations


@fuzz
@given(BYTES)
def test_a_selection_of_other_bytes_is_unknown(content):
    with tempfile.TemporaryDirectory() as name:
        Path(name, "selection.json").write_bytes(content)
        assert Selection.read(Path(name), [1, 2], "val/accuracy").unknown == [1, 2]
