"""Which parameters are trained, how fast, and how much they decay."""

import dataclasses
import json

import jax
import pytest

from vit_nabirds.config import Config, default
from vit_nabirds.config.path_rules import PathRule
from vit_nabirds.errors import ConfigError
from vit_nabirds.models.model import describe
from vit_nabirds.recipe.rules import Rule, describe_rules, parameter_rules, trained_paths

MODEL = describe(dict(image_size=16, patch_size=8, hidden_size=16, num_layers=3, num_heads=2, mlp_dim=32), 5)


def configured(**values):
    config = default()
    config.data.root = "x"
    return Config.read(config).replace(values)


def rules_of(model=MODEL, **values):
    """With the fields of `optimizer` by their last name, others by their dotted one."""
    names = {"trainable", "lora.rank"}
    return parameter_rules(
        configured(**{name if name in names else f"optimizer.{name}": x for name, x in values.items()}), model
    )


def test_every_parameter_has_a_rule_in_the_order_of_the_model():
    rules = rules_of()
    assert list(rules) == list(MODEL.shapes) == trained_paths(rules)
    assert set(rules.values()) == {Rule(1.0, 0.0, False)}


def test_kernels_alone_decay():
    decays = {path: rule.decay for path, rule in rules_of(weight_decay=0.05).items()}
    assert {path for path, decay in decays.items() if decay} == {path for path in decays if path.endswith("/kernel")}
    assert set(decays.values()) == {0.0, 0.05}


def test_each_stage_learns_slower_than_the_one_behind_it():
    scales = {path: rule.scale for path, rule in rules_of(layer_decay=0.5).items()}
    expected = {"classifier/kernel": 1, "final_norm/scale": 1, "cls_token": 1 / 16, "position_embeddings": 1 / 16}
    expected |= {"patch_embeddings/kernel": 1 / 16, "encoder/layers/2/norm1/scale": 1 / 2}
    expected |= {"encoder/layers/1/mlp/layers/0/kernel": 1 / 4, "encoder/layers/0/attn/query/bias": 1 / 8}
    assert {path: scales[path] for path in expected} == expected


def test_the_head_alone_has_its_multiplier():
    scales = {path: rule.scale for path, rule in rules_of(head_multiplier=50.0, layer_decay=0.5).items()}
    assert scales["classifier/kernel"] == scales["classifier/bias"] == 50
    assert scales["final_norm/scale"] == 1 and max(set(scales.values()) - {50}) == 1


def test_trainable_chooses_paths():
    assert trained_paths(rules_of(trainable="classifier")) == ["classifier/bias", "classifier/kernel"]


def test_a_rule_replaces_what_it_names():
    rules = rules_of(
        weight_decay=0.05, head_multiplier=50.0, layer_decay=0.5,
        rules="classifier lr=2; ^cls_token|position wd=0.01; layers/1/attn lr=3 wd=0; patch frozen",
    )  # fmt: skip
    assert rules["classifier/kernel"] == Rule(2.0, 0.05, False)
    assert rules["cls_token"] == rules["position_embeddings"] == Rule(1 / 16, 0.01, False)
    assert rules["encoder/layers/1/attn/out/kernel"] == Rule(3.0, 0.0, False)
    assert rules["encoder/layers/1/mlp/layers/0/kernel"] == Rule(1 / 4, 0.05, False)
    frozen = set(rules) - set(trained_paths(rules))
    assert frozen == {"patch_embeddings/kernel", "patch_embeddings/bias"}


def test_the_first_rule_that_matches_counts():
    rules = rules_of(rules="attn/query lr=2; attn frozen; encoder wd=1")
    assert rules["encoder/layers/0/attn/query/kernel"] == Rule(2.0, 0.0, False)
    assert rules["encoder/layers/0/attn/key/kernel"].frozen
    assert rules["encoder/layers/0/mlp/layers/0/kernel"] == Rule(1.0, 1.0, False)


def test_lora_trains_its_matrices_and_the_classifier():
    base = "encoder/layers/1/attn/query"
    shapes = {f"{base}/lora/{name}": jax.ShapeDtypeStruct((16, 4), "float32") for name in ("lora_a", "lora_b")}
    model = dataclasses.replace(MODEL, shapes=MODEL.shapes | shapes)
    rules = rules_of(model, weight_decay=0.1, layer_decay=0.5, **{"lora.rank": 4})
    assert trained_paths(rules) == ["classifier/bias", "classifier/kernel", *shapes]
    assert rules[f"{base}/lora/lora_a"] == rules[f"{base}/lora/lora_b"] == Rule(1 / 4, 0.1, False)
    rules = rules_of(model, rules="query lr=3", **{"lora.rank": 4})
    assert rules[f"{base}/lora/lora_a"].scale == 3 and rules[f"{base}/kernel"].frozen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainable": "clasifier"}, "config.trainable 'clasifier' matches no parameter path; .* classifier/kernel"),
        ({"rules": "attn/querry wd=0"}, "rules 'attn/querry' matches no parameter path; .* are encoder/.*/attn/query"),
        ({"rules": "attn lr=2; attn/key wd=1"}, "'attn/key' matches only parameters that the rules before it match"),
        (
            {"rules": "encoder lr=2", "trainable": "class"},
            "'encoder' matches only .* config.lora freezes .*and 47 more",
        ),
        ({"rules": "attn frozen", "trainable": "attn"}, "no parameter would be trained"),
    ],
)
def test_a_pattern_that_decides_nothing_is_an_error(values, message):
    with pytest.raises(ConfigError, match=message):
        rules_of(**values)


@pytest.mark.parametrize(
    "rule",
    [
        "attn",
        "attn lr",
        "attn lr=",
        "attn lr=0",
        "attn lr=inf",
        "attn wd=-1",
        "attn wd=nan",
        "attn lr=1 lr=2",
        "(attn lr=1",
    ]
    + ["attn lr=1 frozen", "attn frozen=1", "attn frozen=", "attn rate=1", "frozen", "lr=1", "attn mlp lr=1"],
)
def test_a_rule_that_is_none_is_an_error_with_its_text(rule):
    with pytest.raises(ConfigError) as caught:
        configured(**{"optimizer.rules": f"cls_token lr=1; {rule}"})
    assert f"config.optimizer.rules has {rule!r}: each rule is" in str(caught.value)


def test_rules_are_stored_as_they_were_written():
    text = " cls_token  lr=1e-1 wd=0;patch frozen; "
    config = configured(**{"optimizer.rules": text})
    assert config.optimizer.rules.rules == (PathRule("cls_token", 0.1, 0.0, False), PathRule("patch", None, None, True))
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["optimizer"]["rules"] == text and Config.read(stored) == config
    with pytest.raises(ConfigError, match=r"config.optimizer.rules is 3: it must be text"):
        configured(**{"optimizer.rules": 3})


def test_description_shows_every_parameter_once():
    values = dict(head_multiplier=50.0, weight_decay=0.05, rules="patch frozen; layers/1 lr=0.1; norm1 wd=0.3")
    assert sorted(describe_rules(rules_of(**values), MODEL.shapes)) == [
        "frozen: 3,088 parameters in 2 arrays of patch_embeddings",
        "learning rate x 0.1, weight decay 0.05: 2,048 parameters in 6 arrays of encoder/layers/1",
        "learning rate x 0.1, weight decay 0: 176 parameters in 10 arrays of encoder/layers/1",
        "learning rate x 1, weight decay 0.05: 4,096 parameters in 12 arrays of encoder/layers/0, encoder/layers/2",
        "learning rate x 1, weight decay 0.3: 64 parameters in 4 arrays of encoder/layers/0, encoder/layers/2",
        "learning rate x 1, weight decay 0: 416 parameters in 20 arrays of cls_token, final_norm, position_embeddings, "
        "encoder/layers/0, encoder/layers/2",
        "learning rate x 50, weight decay 0.05: 80 parameters in 1 array of classifier",
        "learning rate x 50, weight decay 0: 5 parameters in 1 array of classifier",
    ]
    assert describe_rules(rules_of(), MODEL.shapes) == [
        "learning rate x 1, weight decay 0: 9,973 parameters in 56 arrays of classifier, cls_token, final_norm, "
        "patch_embeddings, position_embeddings, encoder/layers/0-2"
    ]
