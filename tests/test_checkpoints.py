"""Checkpoint folders of every kind: parity with transformers' torch classes, and errors for broken ones."""

import json

import numpy as np
import pytest
from checkpoints import save_drawn, save_tiny
from conftest import SHARED
from reference_logits import CASES, FILE, drawn, images
from safetensors.flax import load_file, save_file

from vit_nabirds.errors import UserError
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.models.pretrained.checkpoint import find_checkpoint, open_checkpoint
from vit_nabirds.models.pretrained.export import save_checkpoint
from vit_nabirds.models.pretrained.hf_config import DEFAULTS

REFERENCE = np.load(FILE)
REAL = SHARED / "dinov2-small"


def logits(architecture, params, pixels, num_classes):
    model = describe(architecture, num_classes)
    return np.asarray(model.jit(model.logits)(params, pixels))


def load(folder, size=None, labels=None):
    checkpoint = open_checkpoint(str(folder))
    architecture = checkpoint.architecture | {"image_size": size or checkpoint.architecture["image_size"]}
    return architecture, checkpoint.load(architecture, checkpoint.labels if labels is None else labels)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_resized_positions_equal_those_of_torch(case, tmp_path):
    save_drawn(tmp_path, *CASES[case])
    architecture, params = load(tmp_path, 224)
    np.testing.assert_allclose(logits(architecture, params, images(), 6), REFERENCE[case], atol=1e-4)
    if "resized" in case:
        positions = np.asarray(params["position_embeddings"])[..., :8]
        np.testing.assert_allclose(positions, REFERENCE[f"{case}: positions"], atol=1e-5)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real weights are not here")
def test_real_dinov2_gives_the_features_of_torch_and_of_the_vit_made_from_it():
    def features(folder):
        architecture, params = load(folder, 224, labels=[])
        model = describe(architecture | {"pool": "cls"}, 1)
        params = {path: np.zeros(like.shape) for path, like in model.shapes.items()} | params
        return model.jit(lambda params, x: model.bind(params).features(x))(params, images())

    ours = features(REAL)
    np.testing.assert_allclose(ours, REFERENCE["dinov2-small"], atol=1e-4)
    # The ViT is stored in float16. Rounding the DINOv2's weights to float16 moves its features as far: on photographs,
    # by 1.1e-3 of the largest.
    theirs = features(SHARED / "vit-small-patch14-224")
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()


@pytest.fixture
def folder(tmp_path):
    """A tiny DINOv2 with registers, 2 layers of 16 wide."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    fields = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    save_drawn(folder, "dinov2_with_registers", fields | dict(num_register_tokens=2, num_labels=3))
    return folder


def edit(folder, file="config.json", **fields):
    content = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(content))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """Split model.safetensors in two with an index, as the Hub's large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": 0, "model-00002-of-00002.safetensors": 1}
    for name, odd in parts.items():
        save_file({key: x for i, (key, x) in enumerate(tensors.items()) if i % 2 == odd}, folder / name)
    where = {key: list(parts)[i % 2] for i, key in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def in_flax_naming(tensors):
    for name in [name for name in tensors if name.endswith(".weight")]:
        value = tensors.pop(name)
        if value.ndim == 1:
            tensors[name.replace(".weight", ".scale")] = value
        else:
            axes = (2, 3, 1, 0) if value.ndim == 4 else (1, 0)
            tensors[name.replace(".weight", ".kernel")] = value.transpose(axes)


def cast(dtype):
    return lambda tensors: tensors.update({name: value.astype(dtype) for name, value in tensors.items()})


@pytest.mark.parametrize(
    "change",
    [shard, lambda f: edit_tensors(f, in_flax_naming), lambda f: edit_tensors(f, cast("float16")),
     lambda f: edit_tensors(f, cast("bfloat16"))],
    ids=["sharded", "Flax naming", "float16", "bfloat16"],
)  # fmt: skip
def test_every_form_of_the_tensors_gives_the_same_parameters(folder, change):
    _, before = load(folder)
    change(folder)
    _, after = load(folder)
    for path, value in before.items():
        assert after[path].dtype == np.float32
        np.testing.assert_allclose(after[path], value, rtol=1e-2, atol=0)


def test_the_classifier_is_loaded_only_for_its_own_species_in_any_order(folder):
    _, params = load(folder)
    _, turned = load(folder, labels=["LABEL_2", "LABEL_0", "LABEL_1"])
    np.testing.assert_array_equal(turned["classifier/bias"], params["classifier/bias"][[2, 0, 1]])
    np.testing.assert_array_equal(turned["classifier/kernel"], params["classifier/kernel"][:, [2, 0, 1]])
    assert "classifier/kernel" not in load(folder, labels=["LABEL_0", "LABEL_1", "Blue Jay"])[1]
    edit(folder, id2label={"0": "crane", "1": "crane", "2": "maillot"})  # as ImageNet has it
    np.testing.assert_array_equal(load(folder)[1]["classifier/bias"], params["classifier/bias"])


def test_the_account_says_what_becomes_of_each_tensor(folder):
    checkpoint = open_checkpoint(str(folder))
    account = checkpoint.account(checkpoint.architecture | {"image_size": 24}, ["Blue Jay"])
    assert account.splitlines()[1:] == [
        "  loaded   43 tensors (F32)",
        "  resized  positions of 2 x 2 patches to 3 x 3",
        "  new      the classifier",
        "  ignored  classifier.bias, classifier.weight, embeddings.mask_token",
    ]


@pytest.mark.parametrize("model_type", DEFAULTS)
@pytest.mark.parametrize("pool", ["cls", "cls+mean"])
def test_an_export_loads_with_the_same_logits_and_exports_to_the_same_files(model_type, pool, tmp_path):
    for name in ("made", "first", "second"):
        (tmp_path / name).mkdir()
    fields = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    save_drawn(tmp_path / "made", model_type, fields | dict(num_labels=3, use_swiglu_ffn=True))
    architecture, params = load(tmp_path / "made")
    width = 16 if pool == "cls" else 32
    params["classifier/kernel"] = drawn("any", (width, 3))
    architecture |= {"pool": pool}
    pixels = images()[:, :16, :16]
    expected = logits(architecture, params, pixels, 3)
    for name in ("first", "second"):
        normalization = Normalization()
        save_checkpoint(tmp_path / name, architecture, params, ["a", "b", "c"], normalization, "box")
        architecture, params = load(tmp_path / name)
        np.testing.assert_allclose(logits(architecture, params, pixels, 3), expected, atol=1e-5)
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("processor", ["ViTImageProcessor", "BitImageProcessor"])
def test_pictures_are_prepared_as_the_checkpoint_says(folder, processor):
    from PIL import Image

    sizes = dict(size={"height": 16, "width": 16}, do_center_crop=False)
    if processor == "BitImageProcessor":
        sizes = dict(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, do_center_crop=True)
    edit(folder, "preprocessor_config.json", image_processor_type=processor, do_resize=True, resample=2,
         do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, **sizes)  # fmt: skip
    checkpoint = open_checkpoint(str(folder))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    pixels = checkpoint.preprocessing(checkpoint.image_size)(np.asarray(picture))
    resized = picture.resize((16, 16), Image.Resampling.BILINEAR)
    if processor == "BitImageProcessor":
        resized = picture.resize((30, 20), Image.Resampling.BILINEAR).crop((7, 2, 23, 18))
    expected = (np.asarray(resized) / 255 - 0.5) / checkpoint.normalization.std
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


QUERY = "dinov2_with_registers.encoder.layer.1.attention.attention.query.weight"


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def damage_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def two_files(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()


BROKEN = {
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(QUERY)), r"1\.attention.*query.weight' is missing"),
    "misshaped tensor": (lambda f: edit(f, mlp_ratio=2), r"shape \(64, 16\).*implies \(32, 16\)"),
    "extra tensor": (lambda f: edit_tensors(f, lambda t: t.update(extra=t[QUERY])), "no place in the model: 'extra'"),
    "integers": (lambda f: edit_tensors(f, lambda t: t.update({QUERY: t[QUERY].astype("int32")})), "expected floats"),
    "not finite": (lambda f: edit_tensors(f, lambda t: t.update({QUERY: t[QUERY] * np.nan})), "not finite"),
    "fewer layers in config": (lambda f: edit(f, num_hidden_layers=1), "no place in the model"),
    "positions of another size": (lambda f: edit(f, image_size=24), r"position_embeddings' has shape \(1, 5, 16\)"),
    "other family": (lambda f: edit(f, model_type="swin"), "model_type is 'swin'; supported are vit, dinov2, "),
    "no family": (lambda f: edit(f, model_type=None), "model_type is None"),
    "a list of families": (lambda f: edit(f, model_type=[]), r"model_type is \[\]"),
    "a run": (lambda f: ((f / "checkpoints").mkdir(), (f / "config.json").write_text("{}")), "is the workdir of a run"),
    "other activation": (lambda f: edit(f, hidden_act="relu"), "hidden_act is 'relu'; only 'gelu' is supported"),
    "grey images": (lambda f: edit(f, num_channels=1), "num_channels is 1; only 3"),
    "no number": (lambda f: edit(f, hidden_size="16"), "hidden_size is '16'; expected a value like 768"),
    "heads": (
        lambda f: edit(f, num_attention_heads=3),
        "hidden_size is 16; expected a multiple of num_attention_heads, which is 3",
    ),
    "patches": (lambda f: edit(f, patch_size=7), "image_size is 16; expected a multiple of patch_size, which is 7"),
    "images": (
        lambda f: edit(f, "preprocessor_config.json", size=20),
        "size is 20; expected a multiple of",
    ),
    "no square": (lambda f: edit(f, "preprocessor_config.json", size={"height": 16, "width": 8}), "expected a square"),
    "no size": (lambda f: edit(f, "preprocessor_config.json", size=None), "size is None; expected a square"),
    "other scale": (lambda f: edit(f, "preprocessor_config.json", rescale_factor=1.0), "only 1/255 is supported"),
    "one mean": (
        lambda f: edit(f, "preprocessor_config.json", image_mean=0.5),
        "image_mean is 0.5; expected",
    ),
    "no spread": (
        lambda f: edit(f, "preprocessor_config.json", image_std=[0, 0, 0]),
        "image_std is .0, 0, 0.; exp",
    ),
    "no patches": (lambda f: edit(f, patch_size=0), "patch_size is 0; expected a value like 16"),
    "half a layer": (lambda f: edit(f, num_hidden_layers=2.0), "num_hidden_layers is 2.0; expected a value like 12"),
    "a label without a row": (
        lambda f: edit(f, id2label={"0": "a", "1": "b", "3": "c"}),
        "must give a label to each of 0 to 2",
    ),
    "a label that is none": (
        lambda f: edit(f, id2label={"0": "a", "1": "b", "2": None}),
        "must give a label to each of 0 to 2",
    ),
    "labels": (lambda f: edit(f, id2label={"0": "Blue Jay"}), "classifier has 3 rows, so id2label must"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"12345678" * 4), "not a readable safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors"),
    "pickled weights": (pickled, r"pickled \*.bin is not read"),
    "lost shard": (lose_a_shard, "model-00002-of-00002.safetensors is missing, but"),
    "damaged index": (damage_index, "has no weight_map"),
    "no index": (two_files, "keep the file you mean"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "list for config": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "no normalisation": (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_checkpoint_that_does_not_fit_is_an_error(folder, case):
    break_it, message = BROKEN[case]
    break_it(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_checkpoint_that_is_not_there_is_an_error(monkeypatch):
    with pytest.raises(UserError, match="no folder './nothing'"):
        find_checkpoint("./nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nobody/nothing@v2"):
        with pytest.raises(UserError, match="could not be fetched.*hf download nobody/nothing`"):
            find_checkpoint(name)


def test_labels_and_normalisation_that_are_left_out(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"]
    (folder / "config.json").write_text(json.dumps(config))
    edit(folder, "preprocessor_config.json", do_normalize=False)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert checkpoint.normalization == Normalization((0, 0, 0), (1, 1, 1))


def test_a_vit_saved_without_prefix_and_head_loads_too(tmp_path):
    save_tiny(tmp_path)
    _, whole = load(tmp_path)

    def bare(tensors):
        for name in list(tensors):
            value = tensors.pop(name)
            if name.startswith("vit."):
                tensors[name.removeprefix("vit.")] = value
        tensors["pooler.dense.weight"] = value

    edit_tensors(tmp_path, bare)
    _, params = load(tmp_path)
    assert set(whole) - set(params) == {"classifier/kernel", "classifier/bias"}
    for path, value in params.items():
        np.testing.assert_array_equal(value, whole[path])
