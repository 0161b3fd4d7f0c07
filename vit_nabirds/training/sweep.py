"""Classifiers on fixed features, trained side by side at several learning rates and weight decays."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_nabirds.data.sampling import epoch_order
from vit_nabirds.evaluation.figures import figures_of
from vit_nabirds.parallel.preemption import StopRequest
from vit_nabirds.recipe.loss import make_loss
from vit_nabirds.recipe.optimizer import make_optimizer, make_schedule
from vit_nabirds.recipe.rules import parameter_rules, trained_paths
from vit_nabirds.training.features import Features
from vit_nabirds.training.run import Run

Head = dict[str, jax.Array]  # 'classifier/kernel' (width, classes) and 'classifier/bias' (classes), float32


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A classifier after its training with one learning rate and one weight decay."""

    learning_rate: float
    weight_decay: float
    head: dict[str, np.ndarray]
    opt_state: optax.OptState
    train: dict[int, dict[str, float]]  # loss and accuracy of the batch at the end of each epoch, by step
    figures: dict[str, float]  # on the validation photographs, like "val/accuracy"; empty without them


def sweep(
    run: Run,
    head: Head,
    features: dict[str, Features],
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    stop: StopRequest,
) -> list[Candidate] | None:
    """Train all pairs by the run's recipe, in its batches and steps. None after a request to stop.

    `features` are of "train" and, unless nothing is held out, "validation".
    """
    found = []
    for decay in weight_decays:
        if (trained := _train(run, head, features["train"], learning_rates, decay, stop)) is None:
            return None
        for number, rate in enumerate(learning_rates):
            own, opt_state, reports = jax.device_get(jax.tree.map(lambda x, i=number: x[i], trained))
            reports = {step: {name: float(x) for name, x in report.items()} for step, report in reports.items()}
            figures = figures_on(features["validation"], own, run) if "validation" in features else {}
            found.append(Candidate(rate, decay, own, opt_state, reports, figures))
    return found


def _train(
    run: Run, head: Head, train: Features, rates: Sequence[float], decay: float, stop: StopRequest
) -> tuple[Head, optax.OptState, dict[int, dict]] | None:
    """(heads, optimizer states, metrics by step), each array with the learning rates on its first axis."""
    initial, step_of = make_head_step(run, decay)
    rates, reports = jnp.asarray(rates, jnp.float32), {}
    heads, opt_states = jax.tree.map(lambda x: jnp.stack([x] * len(rates)), (head, initial(head)))
    for step in range(1, run.plan.total_steps + 1):
        if stop.requested:
            return None
        chosen = batch_of(run, train.labels, step - 1)
        heads, opt_states, metrics = step_of(rates, heads, opt_states, train.values[chosen], train.labels[chosen])
        if step == run.plan.total_steps or step // run.plan.steps_per_epoch > (step - 1) // run.plan.steps_per_epoch:
            reports[step] = metrics
    return heads, opt_states, reports


def make_head_step(run: Run, decay: float) -> tuple[Callable, Callable]:
    """head -> optimizer state; and jitted (rates (r,), heads, optimizer states, features (n, width), labels (n,)) ->
    (heads, optimizer states, metrics), where all but the batch has an axis of the rates."""
    config = run.config.replace({"optimizer.learning_rate": 1.0, "optimizer.weight_decay": decay})
    unit = make_schedule(config, run.plan)  # schedules are in proportion to their peak
    rules = parameter_rules(config, run.model)
    loss_fn = make_loss(config.loss, np.bincount(run.train_split.labels, minlength=run.model.num_classes))
    trainable = trained_paths(rules)

    def step(rate: jax.Array, head: Head, opt_state: optax.OptState, x: jax.Array, labels: jax.Array):
        trained = {path: head[path] for path in trainable}
        tx = make_optimizer(config, lambda count: rate * unit(count), rules)
        loss_and_gradients = jax.value_and_grad(_loss, has_aux=True)
        (loss, metrics), gradients = loss_and_gradients(trained, head, x, labels, loss_fn)
        updates, opt_state = tx.update(gradients, opt_state, trained)
        return head | optax.apply_updates(trained, updates), opt_state, {"train/loss": loss} | metrics

    def initial(head: Head) -> optax.OptState:
        return make_optimizer(config, unit, rules).init({path: head[path] for path in trainable})

    return initial, jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, None)), donate_argnums=(1, 2))


def _loss(trained: Head, head: Head, x: jax.Array, labels: jax.Array, loss_fn: Callable):
    """(loss, metrics) of a batch; what is not trained is of `head`."""
    return loss_fn(logits_of(head | trained, x), labels)


def batch_of(run: Run, labels: np.ndarray, step: int) -> np.ndarray:
    """Which of the features, int (batch_size,), are in the global batch of a step: those of the run's own order."""
    size, config = run.config.batch_size, run.config
    epochs, places = np.divmod(step * size + np.arange(size), len(labels))
    orders = {epoch: epoch_order(config.seed, int(epoch), labels, config.data.sampling) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


def logits_of(head: Head, x: jax.Array) -> jax.Array:
    """float32 (n, classes) of features (n, width)."""
    return x @ head["classifier/kernel"] + head["classifier/bias"]


def figures_on(features: Features, head: Head, run: Run) -> dict[str, float]:
    """As an evaluation of the whole model on these photographs has them."""
    confusion, top5, loss = jax.device_get(_sums(head, *features))
    figures = figures_of(confusion, int(top5), float(loss), run.taxonomy)
    return {f"val/{name}": value for name, value in figures.items()}


@jax.jit
def _sums(head: Head, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Counts int32 (classes, classes) of (label, prediction), labels among the likeliest five, sum of the losses."""
    logits = logits_of(head, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    _, likeliest = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    confusion = jnp.zeros((logits.shape[-1],) * 2, jnp.int32).at[labels, jnp.argmax(logits, -1)].add(1)
    return confusion, jnp.sum(jnp.any(likeliest == labels[:, None], -1)), jnp.sum(losses)
