"""Parity with Hugging Face's Flax classes."""

import jax
import numpy as np
import pytest
from checkpoints import TINY, save_drawn
from conftest import SHARED
from flax import nnx
from PIL import Image
from reference_logits import drawn
from transformers import (
    AutoImageProcessor,
    FlaxDinov2ForImageClassification,
    FlaxViTForImageClassification,
    ViTConfig,
    ViTImageProcessor,
)

from vit_nabirds.commands.verify import verify
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import zscore
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.models.pretrained.export import save_checkpoint
from vit_nabirds.models.pretrained.hf_config import DEFAULTS, architecture_of
from vit_nabirds.models.vit import VisionTransformer

REAL = SHARED / "vit-small-patch14-224"


def logits(architecture, params, images):
    model = describe(architecture, params["classifier/bias"].shape[0])
    return np.asarray(model.jit(model.logits)(params, images))


def load(folder):
    checkpoint = open_checkpoint(str(folder))
    return checkpoint.architecture, checkpoint.load(checkpoint.architecture, checkpoint.labels)


def randomized(config) -> FlaxViTForImageClassification:
    """Every tensor random: swapped biases, which start at zero, would otherwise go unnoticed."""
    reference = FlaxViTForImageClassification(config, _do_init=False)
    shapes = jax.eval_shape(lambda: reference.init_weights(jax.random.key(0), reference.input_shape))
    draw = np.random.default_rng(2)
    reference._is_initialized = True  # its own initialisation takes half a minute
    reference.params = jax.tree.map(lambda x: draw.normal(0, 0.05, x.shape).astype(np.float32), shapes)
    return reference


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
def test_logits_equal_those_of_hugging_face(size, tmp_path):
    reference = randomized(SIZES[size])
    reference.save_pretrained(tmp_path, safe_serialization=True)
    ViTImageProcessor().save_pretrained(tmp_path)
    architecture, params = load(tmp_path)
    images = images_of(224)
    expected = reference_logits(reference, images)
    np.testing.assert_allclose(logits(architecture, params, images), expected, atol=1e-4)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real weights are not here")
def test_real_checkpoint_gives_the_logits_of_hugging_face():
    architecture, params = load(REAL)
    reference = FlaxViTForImageClassification.from_pretrained(REAL)
    images = images_of(224)
    expected = reference_logits(reference, images)
    np.testing.assert_allclose(logits(architecture, params, images), expected, atol=1e-4)


def test_layer_norm_eps_and_exact_gelu_come_from_the_checkpoint():
    architecture = architecture_of(DEFAULTS["vit"] | {"model_type": "vit", "layer_norm_eps": 0.5})
    block = nnx.eval_shape(lambda: VisionTransformer(**architecture, rngs=nnx.Rngs(0))).encoder.layers[0]
    assert block.norm1.epsilon == 0.5
    assert block.mlp.layers[1](1.0) == pytest.approx(0.8413447)  # the tanh approximation gives 0.8411920


@pytest.mark.parametrize("model_type, pool", [("vit", "cls"), ("vit", "cls+mean"), ("dinov2", "cls")])
def test_transformers_loads_what_is_exported(model_type, pool, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "exported").mkdir()
    save_drawn(tmp_path / "made", model_type, TINY)
    checkpoint = open_checkpoint(str(tmp_path / "made"))
    architecture = checkpoint.architecture | {"pool": pool}
    params = checkpoint.load(architecture, [])
    params |= {"classifier/kernel": drawn("k", (16 if pool == "cls" else 32, 3)), "classifier/bias": drawn("b", (3,))}
    save_checkpoint(tmp_path / "exported", architecture, params, ["a", "b", "c"], checkpoint.normalization, "box")
    classes = {"vit": FlaxViTForImageClassification, "dinov2": FlaxDinov2ForImageClassification}
    reference = classes[model_type if pool == "cls" else "dinov2"].from_pretrained(tmp_path / "exported")
    assert reference.config.id2label == {0: "a", 1: "b", 2: "c"} and reference.config.label2id["c"] == 2
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "exported", use_fast=False)
    pixels = processor(images=list(images), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    ours = zscore(images / np.float32(255), checkpoint.normalization)
    np.testing.assert_allclose(logits(architecture, params, ours), reference_logits(reference, pixels), atol=1e-4)


def test_verify_compares_prints_draws_and_judges(hf_folder, tmp_path, capsys):
    draw = np.random.default_rng(0)
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture in pictures:
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).save(picture)
    assert verify(str(hf_folder), [str(picture) for picture in pictures], tmp_path / "figure.png", 1e-4) == 0
    said = capsys.readouterr().out
    assert "within the tolerance of 0.0001" in said and all(str(picture) in said for picture in pictures)
    for line in [line for line in said.splitlines() if "LABEL_" in line]:
        p, label, our_p, our_label = line.split()
        assert label == our_label and float(p) == pytest.approx(float(our_p), abs=1e-3) and 0 < float(p) < 1
    assert Image.open(tmp_path / "figure.png").size[1] > 2 * 160  # two rows of two
    assert verify(str(hf_folder), [], None, 0.0) == 1
    assert "a drawn bird" in (said := capsys.readouterr().out) and "ABOVE the tolerance" in said
