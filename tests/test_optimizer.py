"""Schedules, weight decay, clipping and the choice of parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from vit_nabirds.config import Config, default
from vit_nabirds.config.plan import Plan
from vit_nabirds.errors import ConfigError
from vit_nabirds.recipe import optimizer


def configured(**fields):
    config = default()
    config.data.root = "x"
    config.epochs, config.batch_size = 5.0, 8  # 20 steps of 32 images
    config.optimizer.update(fields)
    return Config.read(config)


def test_schedule_warms_up_and_ends_at_zero():
    for name, middle in (("linear", 0.5), ("cosine", 0.5)):
        config = configured(schedule=name, learning_rate=2.0, warmup="1 epoch")
        schedule = optimizer.make_schedule(config, Plan.of(config, training_images=32))
        assert [float(schedule(step)) for step in (0, 2, 4)] == [0, 1, 2]
        assert float(schedule(12)) == pytest.approx(2 * middle) and float(schedule(20)) == pytest.approx(0, abs=1e-6)


def test_without_warm_up_it_starts_at_the_peak():
    config = configured(learning_rate=2.0)
    schedule = optimizer.make_schedule(config, Plan.of(config, training_images=32))
    assert float(schedule(0)) == 2 and float(schedule(20)) == pytest.approx(0, abs=1e-6)


def test_warm_up_as_long_as_the_run_is_an_error():
    with pytest.raises(ConfigError, match="warmup is 20 steps, but the whole run has 20"):
        Plan.of(configured(warmup="20 steps"), training_images=32)


PARAMS = {
    "encoder/kernel": jnp.ones(2),
    "encoder/bias": jnp.ones(2),
    "cls_token": jnp.ones(2),
    "classifier/kernel": jnp.ones(2),
}


def first_update(gradient=0.0, **fields):
    tx = optimizer.make_optimizer(configured(**fields), lambda step: 0.1)
    gradients = {path: jnp.full(2, gradient) for path in PARAMS}
    return {path: float(u[0]) for path, u in tx.update(gradients, tx.init(PARAMS), PARAMS)[0].items()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_kernels_alone_decay(name):
    update = first_update(name=name, weight_decay=0.5, momentum=0.0)
    assert update["encoder/kernel"] == pytest.approx(-0.05)
    assert update["encoder/bias"] == update["cls_token"] == 0


def test_the_head_learns_faster_by_its_multiplier():
    update = first_update(gradient=1.0, name="adamw", head_multiplier=10.0)
    assert update["encoder/kernel"] == pytest.approx(-0.1, rel=1e-4)
    assert update["classifier/kernel"] == pytest.approx(-1.0, rel=1e-4)


def test_sgd_is_nesterov():
    assert first_update(gradient=1.0, name="sgd", momentum=0.9)["encoder/bias"] == pytest.approx(-0.1 * 1.9)


def test_gradient_is_clipped_by_its_global_norm():
    update = first_update(gradient=3.0, name="sgd", momentum=0.0, clip_norm=1.0)
    assert np.sqrt(8) * abs(update["encoder/bias"]) == pytest.approx(0.1)


def test_trainable_paths():
    assert optimizer.trainable_paths(list(PARAMS), "classifier") == ["classifier/kernel"]
    assert optimizer.trainable_paths(list(PARAMS), ".*") == list(PARAMS)
    with pytest.raises(ConfigError, match="'clasifier' matches no parameter path"):
        optimizer.trainable_paths(list(PARAMS), "clasifier")
