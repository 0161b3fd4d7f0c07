"""Exact evaluation: every test image is scored once, and sums are taken on the devices."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vit_nabirds.data import batches as data
from vit_nabirds.errors import UserError
from vit_nabirds.models import vit as model
from vit_nabirds.models.normalization import Normalization, to_float, zscore
from vit_nabirds.parallel import devices, preemption, processes
from vit_nabirds.runs import checkpoints as checkpoint
from vit_nabirds.runs.loading import open_run
from vit_nabirds.runs.selection import METRIC

log = logging.getLogger("vit_nabirds")


def make_eval_step(graphdef: nnx.GraphDef, normalization: Normalization) -> Callable:
    """Compiled (params, totals, batch) -> totals with the batch's sums added; records with mask 0 do not count."""

    def eval_step(params: dict, totals: dict, batch: dict) -> dict:
        logits = model.apply(graphdef, params, zscore(to_float(batch["image"]), normalization))
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


def evaluate(
    eval_step: Callable,
    params: dict,
    photographs: data.Photographs,
    num_classes: int,
    batch_size: int,
    workers: int,
    mesh: jax.sharding.Mesh,
    stop: preemption.StopRequest,
) -> dict[str, float] | None:
    """Metrics over the whole split, on all hosts; None when a stop was requested before its end."""
    batch_size = -(-batch_size // mesh.size) * mesh.size
    shard = grain.sharding.ShardByJaxProcess(drop_remainder=True)
    zero, zeros = np.zeros((), np.float32), np.zeros(num_classes, np.float32)
    totals = jax.device_put({"loss": zero, "top1": zeros, "top5": zero, "examples": zeros}, devices.replicated(mesh))
    with contextlib.closing(data.test_batches(photographs, batch_size, workers, shard)) as batches:
        for batch in batches:
            stopping = devices.any_process(mesh, stop.requested)
            batch = devices.to_devices(batch, mesh)
            if np.asarray(stopping)[0]:
                return None
            jax.block_until_ready(totals)  # or the host would run ahead and hold the whole split on the devices
            totals = eval_step(params, totals, batch)
    totals = jax.device_get(totals)
    examples = totals["examples"]
    if examples.sum() != len(photographs):
        raise RuntimeError(f"scored {examples.sum():.0f} of {len(photographs)} test images")
    if not np.isfinite(totals["loss"]):
        raise UserError(
            "the loss on the test images is not a number: the parameters have diverged; lower the learning rate."
        )
    seen = examples > 0
    return {
        "test/loss": float(totals["loss"] / examples.sum()),
        "test/accuracy": float(totals["top1"].sum() / examples.sum()),
        "test/top5_accuracy": float(totals["top5"] / examples.sum()),
        "test/mean_class_accuracy": float(np.mean(totals["top1"][seen] / examples[seen])),
        "test/examples": int(examples.sum()),
    }


def write_results(file: Path, evaluations: dict[int, dict[str, float]], selected: int, last: int) -> None:
    """results.json of a finished training: the selected checkpoint, its scores, and those of the last one."""
    best = {"step": selected, "metric": METRIC, "value": evaluations[selected][METRIC]}
    results = {"selected": best, "test": _of_test(evaluations[selected])}
    checkpoint.write_json(file, results | {"last": {"step": last, "test": _of_test(evaluations[last])}})


def _of_test(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("test/"): value for name, value in metrics.items()}


def evaluate_run(workdir: Path, step: int | None = None, root: str | None = None) -> int:
    """Score a checkpoint of a run (by default its best) and print what it scores as a line of JSON."""
    run = open_run(workdir, step)
    about, mesh = run.about, run.mesh
    config, num_classes = about.config, len(about.species)
    root = Path(root or config["data"]["root"])
    table = data.read_table(root)
    if data.species_names(table) != about.species:
        raise UserError(
            f"the checkpoint was trained on {num_classes} species and {root} has {table['species_id'].n_unique()}, or "
            "others: give the data of the training with --data_root."
        )
    photographs = data.open_split(root, table, train=False)
    data.check_sizes(photographs, photographs, about.architecture["img_size"])

    log.info("evaluating the checkpoint of step %d on %d images of %s", run.step, len(photographs), root)
    eval_step = make_eval_step(run.graphdef, about.normalization)
    with preemption.StopRequest() as stop:
        metrics = evaluate(
            eval_step, run.params, photographs, num_classes, config["batch_size"], config["data"]["workers"], mesh, stop
        )
    if metrics is None:
        return preemption.EXIT_STOPPED
    if data.fingerprint(root, table) != about.fingerprint:
        log.warning("%s has other records or images than the training had", root)
    if processes.is_writer():
        print(json.dumps({"step": run.step, "test": _of_test(metrics)}))
    return 0
