"""Parity with Hugging Face, and the messages for checkpoints that do not fit."""

import json

import jax
import numpy as np
import pytest
from checkpoints import TINY, randomized
from conftest import SHARED
from flax import nnx
from safetensors.flax import load_file, save_file
from transformers import FlaxViTForImageClassification, ViTConfig

from vit_nabirds import model, weights
from vit_nabirds.errors import UserError

REAL = SHARED / "vit-small-patch14-224"


def logits(architecture, params, images):
    graphdef, _ = model.describe(
        {k: v for k, v in architecture.items() if k != "num_classes"}, params["classifier/bias"].shape[0]
    )
    return np.asarray(jax.jit(lambda p, x: model.apply(graphdef, p, x))(params, images))


def images_of(size, count=2):
    return np.random.default_rng(0).normal(size=(count, size, size, 3)).astype(np.float32)


def reference_logits(reference, images):
    forward = jax.jit(lambda params, x: reference(pixel_values=x, params=params).logits)
    return forward(reference.params, images.transpose(0, 3, 1, 2))


SIZES = {
    "B/16": ViTConfig(num_hidden_layers=3, num_labels=7),  # all but the depth of google/vit-base-patch16-224
    "Ti/14, 3 heads": ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, patch_size=14,
        layer_norm_eps=1e-6, num_labels=5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_those_of_hugging_face(size):
    reference = randomized(SIZES[size])
    architecture, params = weights.from_flax_vit(reference)
    images = images_of(224)
    expected = reference_logits(reference, images)
    np.testing.assert_allclose(logits(architecture, params, images), expected, atol=1e-4)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real weights are not here")
def test_real_checkpoint_gives_the_logits_of_hugging_face():
    architecture, _ = weights.read_architecture(REAL)
    params = weights.load_backbone(REAL, architecture)
    reference = FlaxViTForImageClassification.from_pretrained(REAL)
    head = reference.params["classifier"]
    params |= {"classifier/kernel": head["kernel"], "classifier/bias": head["bias"]}
    images = images_of(224)
    expected = reference_logits(reference, images)
    np.testing.assert_allclose(logits(architecture, params, images), expected, atol=1e-4)


def load(folder):
    folder = weights.find_checkpoint(str(folder))
    architecture, normalization = weights.read_architecture(folder)
    return architecture, normalization, weights.load_backbone(folder, architecture)


def test_folder_and_memory_give_the_same_parameters(hf_folder):
    architecture, normalization, backbone = load(hf_folder)
    _, params = weights.from_flax_vit(randomized(TINY))
    assert normalization.mean == (0.1, 0.2, 0.3)
    assert set(params) - set(backbone) == {"classifier/kernel", "classifier/bias"}
    assert set(params) == set(model.describe(architecture, 9)[1])
    for path, value in backbone.items():
        np.testing.assert_array_equal(value, params[path])


def test_layer_norm_eps_and_exact_gelu_come_from_the_checkpoint(hf_folder):
    edit(hf_folder, layer_norm_eps=0.5)
    architecture, *_ = load(hf_folder)
    assert architecture["layer_norm_eps"] == 0.5
    block = nnx.eval_shape(lambda: model.VisionTransformer(**architecture, rngs=nnx.Rngs(0))).encoder.layers[0]
    assert block.norm1.epsilon == 0.5
    assert block.mlp.layers[1](1.0) == pytest.approx(0.8413447)  # the tanh approximation gives 0.8411920


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


QUERY = "vit.encoder.layer.1.attention.attention.query.weight"
BROKEN = {
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(QUERY)), f"'{QUERY}' is missing"),
    "misshaped tensor": (lambda f: edit(f, intermediate_size=64), r"shape \(32, 16\).*asks for \(64, 16\)"),
    "extra tensor": (lambda f: edit_tensors(f, lambda t: t.update(extra=t[QUERY])), "no place in a ViT: extra"),
    "fewer layers in config": (lambda f: edit(f, num_hidden_layers=1), "no place in a ViT"),
    "other family": (lambda f: edit(f, model_type="swin"), "model_type is 'swin'"),
    "other activation": (lambda f: edit(f, hidden_act="relu"), "hidden_act is 'relu'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"12345678" * 4), "not a readable safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no normalisation": (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_checkpoint_that_does_not_fit_is_an_error(hf_folder, case):
    break_it, message = BROKEN[case]
    break_it(hf_folder)
    with pytest.raises(UserError, match=message):
        load(hf_folder)


def test_checkpoint_that_is_not_there_is_an_error(monkeypatch):
    with pytest.raises(UserError, match="no folder './nothing'"):
        weights.find_checkpoint("./nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be fetched"):
        weights.find_checkpoint("nobody/nothing")
