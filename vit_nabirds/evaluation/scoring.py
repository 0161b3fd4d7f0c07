"""Exact evaluation: every photograph of a split is scored once; sums are taken on the devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from jax.sharding import PartitionSpec as P

from vit_nabirds.data.batches import Waiting, eval_batches, unwatched
from vit_nabirds.data.photographs import Photographs
from vit_nabirds.data.taxonomy import Taxonomy
from vit_nabirds.data.unread import Unread
from vit_nabirds.errors import UserError
from vit_nabirds.evaluation.figures import figures_of, intervals_of
from vit_nabirds.evaluation.views import mean_logits, views
from vit_nabirds.models.model import Model
from vit_nabirds.models.normalization import Normalization, to_float, zscore
from vit_nabirds.parallel import devices
from vit_nabirds.parallel.preemption import StopRequest
from vit_nabirds.parallel.sharding import AXES, spec_of


def make_eval_step(model: Model, normalization: Normalization, mesh: jax.sharding.Mesh, kind: str = "one") -> Callable:
    """Jitted (params, totals, batch) -> (totals with the batch's sums added, answers); mask 0 does not count.

    Answers are row (-1 with mask 0), label, the five likeliest classes and their probabilities, on every host. Logits
    are means over the `views` of that kind.
    """

    def on_device(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float32 logits (images, classes); the likeliest classes and their probabilities."""
        seen = zscore(views(to_float(images), kind), normalization)
        logits = mean_logits(functools.partial(logits_of, params), seen)
        # By logits, because probabilities may be equal where logits are not.
        highest, classes = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        return logits, jnp.exp(highest - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), classes

    def logits_of(params: dict, x: jax.Array) -> jax.Array:
        for number in range(model.num_stages):
            x = model.stage(number, params, None, {}, x)
        return x

    specs = {path: spec_of(x.shape, mesh.shape["fsdp"]) for path, x in model.shapes.items()}
    # On each device by itself: XLA would gather all logits and sort them, 5 to 25 times slower on a CPU.
    on_device = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, P(AXES)), out_specs=P(AXES), check_vma=False
    )  # fmt: skip

    def eval_step(params: dict, totals: dict, batch: dict) -> tuple[dict, dict]:
        logits, probabilities, classes = on_device(params, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        row = jnp.where(batch["mask"] > 0, batch["row"], -1)
        answers = {"row": row, "label": batch["label"], "classes": classes, "probabilities": probabilities}
        answers |= {"likeliest": jnp.argmax(logits, axis=-1)}
        # A few bytes for each record; the matrix is then added up on each device alike, and never sent.
        answers = jax.lax.with_sharding_constraint(answers, devices.replicated(mesh))
        counts = (answers["row"] >= 0).astype(jnp.int32)
        hits = jnp.any(answers["classes"] == answers["label"][:, None], axis=-1)
        totals = {
            "loss": totals["loss"] + jnp.sum(losses * batch["mask"]),
            "top5": totals["top5"] + jnp.sum(hits * counts),
            "confusion": totals["confusion"].at[answers["label"], answers["likeliest"]].add(counts),
        }
        return totals, answers

    return model.jit(eval_step, donate_argnums=1)


@dataclasses.dataclass(frozen=True)
class Scores:
    figures: dict[str, float]
    intervals: dict[str, list[float]]  # of the accuracies, 95 %
    skipped: int  # photographs that could not be read
    answers: dict[str, np.ndarray]  # of `make_eval_step`, for all photographs that were scored

    def named(self, split: str) -> dict[str, float]:
        """The figures as metrics.jsonl and TensorBoard have them: "test/accuracy"."""
        return {f"{split}/{name}": value for name, value in self.figures.items()}

    def as_json(self) -> dict:
        return self.figures | self.intervals | ({"skipped": self.skipped} if self.skipped else {})

    def predictions(self, test: pl.DataFrame, classes: list[str]) -> pl.DataFrame:
        """path, label, the five likeliest classes and their probabilities, for the rows of a table from `read_table`
        that has their number as `row`. Null for photographs that could not be read."""
        answers = pl.DataFrame(
            {
                "row": self.answers["row"],
                "predictions": np.array(classes)[self.answers["classes"]].tolist(),
                "probabilities": self.answers["probabilities"].tolist(),
            },
            schema={"row": pl.UInt32, "predictions": pl.List(pl.String), "probabilities": pl.List(pl.Float32)},
        )
        rows = test.select("row", "path", label="class_name")
        return rows.join(answers, on="row", how="left", maintain_order="left").drop("row")


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores parameters on one split, on all devices of all hosts."""

    eval_step: Callable
    photographs: Photographs
    unread: Unread  # of these
    num_classes: int
    batch_size: int
    mesh: jax.sharding.Mesh
    taxonomy: Taxonomy | None
    workers: int

    def score(self, params: dict, stop: StopRequest, waits_for: Waiting = unwatched) -> Scores | None:
        """None when a stop was requested before the end."""
        batch_size = -(-self.batch_size // self.mesh.size) * self.mesh.size
        shard = grain.sharding.ShardByJaxProcess(drop_remainder=True)
        totals = {"loss": np.float32(0), "top5": np.int32(0)}
        totals["confusion"] = np.zeros((self.num_classes, self.num_classes), np.int32)
        totals, answers = jax.device_put(totals, devices.replicated(self.mesh)), []
        batches = eval_batches(self.photographs, batch_size, self.workers, shard, self.unread.are_tolerated, waits_for)
        with contextlib.closing(batches):
            for batch in self.unread.watch(batches):
                stopping = devices.any_process(self.mesh, stop.requested)
                batch = devices.to_devices(batch, self.mesh)
                if np.asarray(stopping)[0]:
                    return None
                if answers:  # of the batch before: the host must not run ahead and hold the whole split on the devices
                    answers[-1] = jax.device_get(answers[-1])
                totals, new = self.eval_step(params, totals, batch)
                answers.append(new)
        return self._scores(jax.device_get(totals), jax.device_get(answers))

    def _scores(self, totals: dict, answers: list[dict]) -> Scores:
        joined = {name: np.concatenate([batch[name] for batch in answers]) for name in answers[0]}
        joined = {name: values[joined["row"] >= 0] for name, values in joined.items()}
        examples, expected = int(totals["confusion"].sum()), len(self.photographs)
        if examples != len(joined["row"]) or (examples != expected and not self.unread.are_tolerated):
            raise RuntimeError(f"scored {examples} of {expected} photographs")
        self.unread.check(expected - examples)
        if not np.isfinite(totals["loss"]):
            raise UserError(
                "the loss of an evaluation is not finite: the parameters have diverged; lower the learning rate."
            )
        figures = figures_of(totals["confusion"], totals["top5"], totals["loss"], self.taxonomy)
        intervals = intervals_of(figures, totals["confusion"])
        return Scores(figures, intervals, expected - examples, joined)
