"""Low-rank changes beside frozen weights: what they compute, what they train, and how a run with them is read."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import TINY, save_drawn
from safetensors.numpy import load_file, save_file

from vit_nabirds.config import Config, default
from vit_nabirds.config.fields import Lora
from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.models.model import describe
from vit_nabirds.models.normalization import Normalization
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.recipe.loss import cross_entropy
from vit_nabirds.runs.checkpoints import Checkpoints, Metadata, base_checksum, digest, sha256_of
from vit_nabirds.runs.loading import open_run
from vit_nabirds.training.gradients import loss_and_gradients

SHAPE = dict(image_size=16, patch_size=8, num_layers=2, num_heads=2, mlp_dim=32, hidden_size=16)
DINO = SHAPE | dict(pool="cls+mean", num_registers=2, layer_scale=True, gated=True, qkv_bias=False)
LORA = Lora(rank=3, alpha=6.0)
IMAGES, LABELS = jax.random.normal(jax.random.key(1), (4, 16, 16, 3)), jnp.arange(4)


def drawn(model, seed=0):
    """Parameters of which none is zero."""
    draw = np.random.default_rng(seed)
    return {path: jnp.asarray(draw.normal(0, 0.2, x.shape), jnp.float32) for path, x in model.shapes.items()}


def some(params, paths):
    return {path: params[path] for path in paths}


def logits(model, params):
    return np.asarray(model.jit(model.logits)(params, IMAGES))


def by_hand(params, scale):
    """Kernels with their changes, in NumPy."""
    kernels = {path.removesuffix("/lora/lora_a"): path for path in params if path.endswith("/lora_a")}
    merged = {path: np.asarray(x) for path, x in params.items() if "/lora/" not in path}
    for layer in kernels:
        a, b = (np.asarray(params[f"{layer}/lora/lora_{x}"], np.float64) for x in "ab")
        merged[f"{layer}/kernel"] = merged[f"{layer}/kernel"] + scale * (a @ b).reshape(merged[f"{layer}/kernel"].shape)
    return merged


@pytest.mark.parametrize("shape, dtype", [(SHAPE, "float32"), (DINO, "float32"), (SHAPE, "bfloat16")])
def test_before_the_first_step_it_is_the_plain_model_bit_for_bit(shape, dtype):
    plain, changed = describe(shape, 4, dtype), describe(shape, 4, dtype, lora=LORA)
    params = {path: 0 * x if path.endswith("lora_b") else x for path, x in drawn(changed).items()}
    assert len(params) == len(plain.shapes) + 2 * 6 * 2 and changed.architecture == plain.architecture
    np.testing.assert_array_equal(logits(changed, params), logits(plain, some(params, plain.shapes)))


@pytest.mark.parametrize("shape", [SHAPE, DINO], ids=["ViT", "DINOv2"])
def test_merged_parameters_of_the_plain_model_give_the_same_logits(shape):
    plain, changed = describe(shape, 4), describe(shape, 4, lora=LORA)
    params = drawn(changed)
    merged = changed.merged(params)
    assert {path: x.shape for path, x in merged.items()} == {path: x.shape for path, x in plain.shapes.items()}
    for path, expected in by_hand(params, scale=2.0).items():
        np.testing.assert_allclose(merged[path], expected, atol=1e-6)
    np.testing.assert_allclose(logits(changed, params), logits(plain, merged), atol=1e-5)
    assert np.abs(logits(changed, params) - logits(changed, drawn(changed, seed=1))).max() > 0.1
    assert plain.merged(merged) == merged


def test_gradients_reach_the_changes_and_the_classifier_alone_and_are_those_of_the_chain_rule():
    """Of the kernel K = K0 + s A B they are G, so those of A are s G Bᵀ, and those of B s Aᵀ G."""
    plain, changed = describe(SHAPE, 4), describe(SHAPE, 4, lora=LORA)
    params, trained = drawn(changed), changed.stored_paths
    keys = jax.random.split(jax.random.key(2), 4)
    step = functools.partial(loss_and_gradients, changed, cross_entropy, trained, lambda x: x, "float32")
    _, _, ours = jax.jit(step)(params, IMAGES, LABELS, keys)
    differentiate = jax.jit(jax.grad(lambda params: cross_entropy(plain.logits(params, IMAGES), LABELS)[0]))
    of_kernels = differentiate(changed.merged(params))
    assert sorted(ours) == sorted(path for path in changed.shapes if "/lora/" in path or "classifier/" in path)
    for path, gradient in ours.items():
        layer, _, name = path.partition("/lora/")
        if not name:
            np.testing.assert_allclose(gradient, of_kernels[path], atol=1e-5)
            continue
        a, b = (params[f"{layer}/lora/lora_{x}"] for x in "ab")
        kernel = of_kernels[f"{layer}/kernel"].reshape(len(a), -1)
        np.testing.assert_allclose(gradient, 2 * (kernel @ b.T if name == "lora_a" else a.T @ kernel), atol=1e-5)


def test_the_pattern_chooses_projections_of_blocks_alone():
    def layers(targets):
        shapes = describe(SHAPE, 4, lora=Lora(rank=2, targets=targets)).shapes
        return [path.partition("/lora/")[0] for path in shapes if path.endswith("/lora/lora_a")]

    assert layers("query|value") == [f"encoder/layers/{i}/attn/{part}" for i in (0, 1) for part in ("query", "value")]
    assert layers("layers/1/mlp") == ["encoder/layers/1/mlp/layers/0", "encoder/layers/1/mlp/layers/2"]
    assert len(layers(".")) == 12
    with pytest.raises(ConfigError, match="config.lora.targets 'patch_embeddings' matches no layer"):
        layers("patch_embeddings")


def test_the_second_factor_is_zero_the_first_is_drawn_as_peft_draws_it_and_all_else_as_without_them():
    """torch's kaiming_uniform_(a=√5): uniform within 1 / √(fan in)."""
    shape = SHAPE | {"num_layers": 1, "hidden_size": 208, "mlp_dim": 416}
    params = describe(shape, 4, lora=Lora(rank=200)).initial_params(seed=5)
    plain = describe(shape, 4).initial_params(seed=5)
    assert all(np.array_equal(params[path], plain[path]) for path in plain)
    assert not any(x.any() for path, x in params.items() if path.endswith("lora_b"))
    for path, fan_in in {"attn/out": 208, "mlp/layers/0": 208, "mlp/layers/2": 416}.items():
        a = params[f"encoder/layers/0/{path}/lora/lora_a"]
        assert a.shape[0] == fan_in and a.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.03)
        assert 0.99 < np.abs(a).max() * fan_in**0.5 <= 1


SPECIES = ["wren", "heron", "crane"]
FIELDS = {"lora.rank": LORA.rank, "lora.alpha": LORA.alpha}


def start(source, image_size=16, lora=LORA):
    """The model of a run from a checkpoint's folder, and its parameters when it has trained a little."""
    checkpoint = open_checkpoint(str(source))
    architecture = checkpoint.architecture | {"image_size": image_size}
    model = describe(architecture, len(SPECIES), lora=lora)
    return model, drawn(model) | checkpoint.load(architecture, SPECIES, jnp.asarray)


def save_run(workdir, source, model, parts, below="", **fields):
    """The workdir of a run with a checkpoint. The weights are those of the folder `below`, `source` if not given."""
    config = default()
    config.data.root, config.model.pretrained = "birds", str(source)
    config = Config.read(config).replace(fields)
    below = below or source
    base = base_checksum(open_checkpoint(str(below)).load(model.architecture, SPECIES, sha256_of)) if below else None
    metadata = Metadata(config.to_dict(), model.architecture, SPECIES, Normalization(), "data", base=base)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        checkpoints.save(3, parts, digest(parts), metadata)


@pytest.mark.parametrize("image_size", [16, 24])
def test_a_run_is_read_with_its_changes_added_to_the_weights_that_it_started_from(hf_folder, tmp_path, image_size):
    model, params = start(hf_folder, image_size)
    save_run(tmp_path / "run", hf_folder, model, {"params": some(params, model.stored_paths)}, **FIELDS)
    run = open_run(tmp_path / "run")
    assert run.model.shapes.keys() == describe(model.architecture, len(SPECIES)).shapes.keys() == run.params.keys()
    expected = by_hand(params, scale=2.0)
    assert not np.allclose(run.params["encoder/layers/0/attn/out/kernel"], params["encoder/layers/0/attn/out/kernel"])
    for path, value in run.params.items():
        np.testing.assert_allclose(value, expected[path], atol=1e-6)


def test_the_moving_average_is_read_in_place_of_what_was_trained(hf_folder, tmp_path):
    plain, params = start(hf_folder, lora=Lora())
    average = {"classifier/kernel": params["classifier/kernel"] + 1}
    save_run(tmp_path / "plain", hf_folder, plain, {"params": params, "ema": average}, ema_decay=0.9)
    found = open_run(tmp_path / "plain").params
    assert found.keys() == params.keys()
    assert all(np.array_equal(found[path], value) for path, value in (params | average).items())

    model, params = start(hf_folder)
    average = {path: x + 0.1 for path, x in some(params, model.stored_paths).items()}
    parts = {"params": some(params, model.stored_paths), "ema": average}
    save_run(tmp_path / "lora", hf_folder, model, parts, ema_decay=0.9, **FIELDS)
    found = open_run(tmp_path / "lora").params
    for path, value in by_hand(params | average, scale=2.0).items():
        np.testing.assert_allclose(found[path], value, atol=1e-6)


def test_a_run_may_be_what_another_changes(hf_folder, tmp_path):
    """At another size of the images, as if it had been a checkpoint of the Hub."""
    plain, params = start(hf_folder, lora=Lora())
    save_run(tmp_path / "first", hf_folder, plain, {"params": params})
    model, params = start(hf_folder, 24)
    parts = {"params": some(params, model.stored_paths)}
    save_run(tmp_path / "of the Hub", hf_folder, model, parts, **FIELDS)
    save_run(tmp_path / "of a run", tmp_path / "first", model, parts, below=hf_folder, **FIELDS)
    ours, theirs = (open_run(tmp_path / name).params for name in ("of a run", "of the Hub"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in ours)


@pytest.mark.parametrize(
    "change, message",
    [
        (shutil.rmtree, r"needs these: put them there again, or .* \(there is no folder"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678" * 4), "not a readable safetensors"),
        (lambda folder: save_drawn(folder, "vit", TINY | {"num_hidden_layers": 3}), r"\(others are there now\)"),
    ],
    ids=["gone", "damaged", "another shape"],
)
def test_a_run_whose_weights_below_are_gone_or_others_is_an_error(hf_folder, tmp_path, change, message):
    model, params = start(hf_folder)
    save_run(tmp_path / "run", hf_folder, model, {"params": some(params, model.stored_paths)}, **FIELDS)
    change(hf_folder)
    with pytest.raises(UserError, match=f"low-rank changes of the weights of '{hf_folder}'.*{message}"):
        open_run(tmp_path / "run")


def test_weights_that_differ_in_one_value_are_others(hf_folder, tmp_path):
    model, params = start(hf_folder)
    save_run(tmp_path / "run", hf_folder, model, {"params": some(params, model.stored_paths)}, **FIELDS)
    tensors = load_file(hf_folder / "model.safetensors")
    tensors["vit.layernorm.bias"][3] += 1e-6
    save_file(tensors, hf_folder / "model.safetensors")
    with pytest.raises(UserError, match=r"put them there again, or .* \(others are there now\)"):
        open_run(tmp_path / "run")


def test_a_run_is_read_from_where_its_weights_lie_now(hf_folder, tmp_path):
    """A training that goes on with another path writes it into config.json."""
    model, params = start(hf_folder)
    save_run(tmp_path / "run", hf_folder, model, {"params": some(params, model.stored_paths)}, **FIELDS)
    before = open_run(tmp_path / "run").params
    moved = hf_folder.rename(tmp_path / "moved")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["pretrained"] = str(moved)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    after = open_run(tmp_path / "run").params
    assert all(np.array_equal(after[path], before[path]) for path in before)


def test_a_rank_above_the_width_of_a_layer_is_an_error():
    with pytest.raises(ConfigError, match="config.lora.rank is 17, but encoder/layers/0/attn/key has no more than 16"):
        describe(SHAPE, len(SPECIES), lora=Lora(rank=17))


def test_changes_of_random_weights_are_an_error(hf_folder, tmp_path):
    model, params = start(hf_folder)
    with pytest.raises(ConfigError, match="there are no weights to change: set config.model.pretrained"):
        save_run(tmp_path / "run", "", model, {"params": some(params, model.stored_paths)}, **FIELDS)
        open_run(tmp_path / "run")
