"""Schedules and optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_nabirds.config import Config, default
from vit_nabirds.config.plan import Plan
from vit_nabirds.errors import ConfigError
from vit_nabirds.recipe import optimizer
from vit_nabirds.recipe.rules import Rule


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


def test_constant_schedule_stays_at_the_peak_until_its_cool_down():
    config = configured(schedule="constant", learning_rate=2.0, warmup="1 epoch", cooldown="8 steps")
    plan = Plan.of(config, training_images=32)
    schedule = optimizer.make_schedule(config, plan)
    assert plan.cooldown_steps == 8
    rates = [float(schedule(step)) for step in (0, 2, 4, 11, 12, 14, 16, 19, 20)]
    assert rates == pytest.approx([0, 1, 2, 2, 2, 1.5, 1, 0.25, 0])


@pytest.mark.parametrize(
    ("fields", "rates"),
    [({}, [2, 2, 2]), ({"cooldown": "20 steps"}, [2, 1.5, 0.1]), ({"warmup": "10 steps"}, [0, 1, 2])]
    + [({"warmup": "10 steps", "cooldown": "10 steps"}, [0, 1, 0.2])],
)
def test_constant_schedule_with_and_without_its_ends(fields, rates):
    config = configured(schedule="constant", learning_rate=2.0, **fields)
    schedule = optimizer.make_schedule(config, Plan.of(config, training_images=32))
    assert [float(schedule(step)) for step in (0, 5, 19)] == pytest.approx(rates)


def test_cool_down_that_does_not_fit_is_an_error():
    with pytest.raises(ConfigError, match="cooldown is 2 steps, but config.optimizer.schedule is 'cosine'"):
        Plan.of(configured(cooldown="2 steps"), training_images=32)
    with pytest.raises(
        ConfigError, match="warmup is 8 and config.optimizer.cooldown 13 steps, but the whole run has 20"
    ):
        Plan.of(configured(schedule="constant", warmup="2 epochs", cooldown="13 steps"), training_images=32)


PARAMS = {
    "encoder/kernel": jnp.ones(2),
    "encoder/bias": jnp.ones(2),
    "cls_token": jnp.ones(2),
    "classifier/kernel": jnp.ones(2),
}
RULES = {
    "encoder/kernel": Rule(1.0, 0.5, False),
    "encoder/bias": Rule(1.0, 0.0, False),
    "cls_token": Rule(0.5, 0.2, False),
    "classifier/kernel": Rule(10.0, 0.5, False),
}
WITHOUT_DECAY = {path: rule._replace(decay=0.0) for path, rule in RULES.items()}
NAMES = ["adamw", "sgd", "lion", "muon"]


def updates(gradients, params=PARAMS, rules=RULES, **fields):
    """What each of these gradients by path changes, at a learning rate of 0.1, and the last state."""
    tx = optimizer.make_optimizer(configured(**fields), lambda step: 0.1, rules)
    state, changes = tx.init(params), []
    for gradient in gradients:
        update, state = jax.jit(tx.update)(gradient, state, params)
        params = optax.apply_updates(params, update)
        changes.append(update)
    return changes, state


def without_momentum(name) -> dict:
    return {"momentum": 0.0} if name == "sgd" else {}


def first_update(gradient=0.0, **fields):
    change = updates([{path: jnp.full(2, gradient) for path in PARAMS}], **fields)[0][0]
    return {path: float(u[0]) for path, u in change.items()}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_decay_by_their_rules(name):
    update = first_update(name=name, **without_momentum(name))
    expected = {"encoder/kernel": -0.05, "encoder/bias": 0, "cls_token": -0.01, "classifier/kernel": -0.5}
    assert update == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_learn_at_the_rates_of_their_rules(name):
    update = first_update(gradient=1.0, name=name, **without_momentum(name), rules=WITHOUT_DECAY)
    expected = {"encoder/kernel": -0.1, "encoder/bias": -0.1, "cls_token": -0.05, "classifier/kernel": -1.0}
    assert update == pytest.approx(expected, rel=1e-4)


def test_sgd_is_nesterov():
    assert first_update(gradient=1.0, name="sgd", momentum=0.9)["encoder/bias"] == pytest.approx(-0.1 * 1.9)


def test_gradient_is_clipped_by_its_global_norm():
    update = first_update(gradient=3.0, name="sgd", momentum=0.0, clip_norm=1.0)
    assert np.sqrt(8) * abs(update["encoder/bias"]) == pytest.approx(0.1)


def adamw_of_pytorch(w, gradients, lr, decay):
    """float64 changes of a parameter, as torch.optim.AdamW's documentation has them."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        before, w = w, w - lr * decay * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        yield w - before


def sgd_of_pytorch(w, gradients, lr, decay):
    """The same of torch.optim.SGD with nesterov and momentum 0.9."""
    buffer = 0.0
    for g in gradients:
        g = g + decay * w
        buffer = 0.9 * buffer + g
        before, w = w, w - lr * (g + 0.9 * buffer)
        yield w - before


def lion_of_its_authors(w, gradients, lr, decay):
    """The same of algorithm 2 of Chen et al., 2023."""
    m = 0.0
    for g in gradients:
        before, w = w, w - lr * (np.sign(0.9 * m + 0.1 * g) + decay * w)
        m = 0.99 * m + 0.01 * g
        yield w - before


@pytest.mark.parametrize(
    ("name", "reference"), [("adamw", adamw_of_pytorch), ("sgd", sgd_of_pytorch), ("lion", lion_of_its_authors)]
)
def test_optimizer_is_that_of_its_authors(name, reference):
    # Of the second, the size at which Lion's sign depends on what the momentum keeps of the first.
    gradients = [np.float32([10, 10]), np.float32([-1.2, -0.6]), np.float32([0.1, -2])]
    changes, _ = updates([{path: g for path in PARAMS} for g in gradients], name=name)
    for path, rule in RULES.items():
        expected = list(reference(np.ones(2), gradients, 0.1 * rule.scale, rule.decay))
        np.testing.assert_allclose([change[path] for change in changes], expected, rtol=1e-4, err_msg=path)


def state_paths(**fields):
    _, state = updates([PARAMS], **fields)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]


def test_state_lies_where_the_checkpoints_of_earlier_versions_have_it():
    paths = sorted(PARAMS)
    moments = ["1/count", *(f"1/{moment}/{path}" for moment in ("mu", "nu") for path in paths), "4/count"]
    assert state_paths(name="adamw") == state_paths(name="adamw", clip_norm=1.0, weight_decay=0.1) == moments
    assert state_paths(name="sgd") == [*(f"2/trace/{path}" for path in paths), "4/count"]


@pytest.mark.parametrize(("name", "moments"), [("adamw", "mu"), ("sgd", "trace"), ("lion", "mu"), ("muon", "mu")])
def test_first_moments_alone_are_stored_in_their_dtype(name, moments):
    gradients = [{path: np.full(2, 0.3, np.float32) for path in PARAMS}] * 3
    (*_, exact), _ = updates(gradients, rules=WITHOUT_DECAY, name=name)
    (*_, rounded), state = updates(gradients, rules=WITHOUT_DECAY, name=name, moment_dtype="bfloat16")
    for path, leaf in jax.tree.leaves_with_path(state):
        is_first = f"/{moments}/" in jax.tree_util.keystr(path, simple=True, separator="/")
        assert (leaf.dtype == jnp.bfloat16) == is_first
    assert all(rounded[path].dtype == jnp.float32 for path in PARAMS)
    np.testing.assert_allclose(*([update[path] for path in PARAMS] for update in (exact, rounded)), rtol=1e-2)


BLOCK = "encoder/layers/0"
ARRAYS = {  # path: shape of the array, and of the matrix
    f"{BLOCK}/attn/query/kernel": ((12, 2, 3), (12, 6)),
    f"{BLOCK}/attn/out/kernel": ((2, 3, 12), (6, 12)),
    f"{BLOCK}/mlp/layers/0/kernel": ((6, 24), (6, 24)),
}
OTHERS = {"classifier/kernel": (6, 4), "patch_embeddings/kernel": (8, 6), f"{BLOCK}/attn/query/bias": (2, 3)}


def orthogonal(x):
    """Five Newton-Schulz steps (https://kellerjordan.github.io/posts/muon) in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(5):
        y = x @ x.T
        x = a * x + (b * y + c * y @ y) @ x
    return x


def test_muon_orthogonalises_the_matrices_of_blocks_and_leaves_the_rest_to_adam():
    random = np.random.RandomState(0)
    shapes = {path: shape for path, (shape, _) in ARRAYS.items()} | OTHERS
    params = {path: jnp.asarray(random.randn(*shape), jnp.float32) for path, shape in shapes.items()}
    gradients = [{path: random.randn(*shape).astype(np.float32) for path, shape in shapes.items()} for _ in range(2)]
    rules = {path: Rule(1.0, 0.0, False) for path in shapes}
    changes, _ = updates(gradients, params, rules, name="muon")
    adams, _ = updates(gradients, params, rules, name="adamw")
    for path in OTHERS:
        np.testing.assert_array_equal(changes[1][path], adams[1][path])
    for path, (_, matrix) in ARRAYS.items():
        first, second = (g[path].reshape(matrix).astype(float) for g in gradients)
        # Nesterov momentum 0.95, whose mean of two is that of the step ahead.
        for update, direction in ((changes[0], first), (changes[1], _nesterov(first, second))):
            expected = -0.1 * 0.2 * np.sqrt(max(matrix)) * orthogonal(direction)
            np.testing.assert_allclose(update[path].reshape(matrix), expected, rtol=1e-3, atol=1e-5, err_msg=path)
        lengths = np.linalg.svd(np.asarray(changes[0][path]).reshape(matrix), compute_uv=False)
        assert np.all(np.abs(lengths / (0.02 * np.sqrt(max(matrix))) - 1) < 0.5), "singular values are all near 1"
        assert np.sqrt(np.mean(np.square(changes[0][path]))) == pytest.approx(0.1 * 0.2, rel=0.3), "as large as Adam's"


def _nesterov(first, second):
    """The direction of the second step, with the momentum 0.95 m + 0.05 g corrected for its start at 0."""
    momentum = 0.95 * 0.05 * first + 0.05 * second
    return 0.95 * momentum / (1 - 0.95**3) + 0.05 * second / (1 - 0.95**2)


def test_muon_without_a_block_to_train_is_adam():
    assert first_update(gradient=1.0, name="muon") == first_update(gradient=1.0, name="adamw")
