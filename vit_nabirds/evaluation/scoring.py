"""Exact evaluation: every test photograph is scored once; sums are taken on the devices."""

import contextlib
from collections.abc import Callable

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_nabirds.data.batches import test_batches
from vit_nabirds.data.photographs import Photographs
from vit_nabirds.errors import UserError
from vit_nabirds.models.model import Model
from vit_nabirds.models.normalization import Normalization, to_float, zscore
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.preemption import StopRequest


def make_eval_step(model: Model, normalization: Normalization) -> Callable[[dict, dict, dict], dict]:
    """Jitted (params, totals, batch) -> totals with the batch's sums added; records with mask 0 do not count."""

    def eval_step(params: dict, totals: dict, batch: dict) -> dict:
        logits = model.logits(params, zscore(to_float(batch["image"]), normalization))
        labels, mask = batch["label"], batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        _, top5 = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (top5 == labels[:, None]) * mask[:, None]
        by_class = jax.nn.one_hot(labels, logits.shape[-1]) * mask[:, None]
        return {
            "loss": totals["loss"] + jnp.sum(losses * mask),
            "top1": totals["top1"] + by_class.T @ hits[:, 0],
            "top5": totals["top5"] + jnp.sum(hits),
            "examples": totals["examples"] + jnp.sum(by_class, axis=0),
        }

    return model.jit(eval_step, donate_argnums=1)


def score(
    eval_step: Callable,
    params: dict,
    photographs: Photographs,
    num_classes: int,
    batch_size: int,
    workers: int,
    mesh: jax.sharding.Mesh,
    stop: StopRequest,
) -> dict[str, float] | None:
    """Metrics over the whole split, on all hosts; None when a stop was requested before its end."""
    batch_size = -(-batch_size // mesh.size) * mesh.size
    shard = grain.sharding.ShardByJaxProcess(drop_remainder=True)
    zero, zeros = np.zeros((), np.float32), np.zeros(num_classes, np.float32)
    totals = jax.device_put({"loss": zero, "top1": zeros, "top5": zero, "examples": zeros}, devices.replicated(mesh))
    with contextlib.closing(test_batches(photographs, batch_size, workers, shard)) as batches:
        for batch in batches:
            stopping = devices.any_process(mesh, stop.requested)
            batch = devices.to_devices(batch, mesh)
            if np.asarray(stopping)[0]:
                return None
            jax.block_until_ready(totals)  # or the host would run ahead and hold the whole split on the devices
            totals = eval_step(params, totals, batch)
    return metrics_of(jax.device_get(totals), len(photographs))


def metrics_of(totals: dict[str, np.ndarray], expected: int) -> dict[str, float]:
    """Means from the sums over `expected` photographs."""
    examples = totals["examples"]
    if examples.sum() != expected:
        raise RuntimeError(f"scored {examples.sum():.0f} of {expected} test photographs")
    if not np.isfinite(totals["loss"]):
        raise UserError(
            "the loss on the test photographs is not finite: the parameters have diverged; lower the learning rate."
        )
    seen = examples > 0
    return {
        "test/loss": float(totals["loss"] / examples.sum()),
        "test/accuracy": float(totals["top1"].sum() / examples.sum()),
        "test/top5_accuracy": float(totals["top5"] / examples.sum()),
        "test/mean_class_accuracy": float(np.mean(totals["top1"][seen] / examples[seen])),
        "test/examples": int(examples.sum()),
    }
