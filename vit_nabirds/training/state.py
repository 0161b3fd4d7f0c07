"""The state of a training."""

import dataclasses
from collections.abc import Collection
from typing import Self

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. Arrays by path, like 'encoder/layers/0/attn/query/kernel'."""

    step: jax.Array  # int32 ()
    params: dict[str, jax.Array]  # float32
    opt_state: optax.OptState  # of the trainable parameters
    ema: dict[str, jax.Array] | None = None  # moving average of the trainable parameters

    @classmethod
    def initial(
        cls,
        params: dict[str, jax.Array],
        tx: optax.GradientTransformation,
        trainable: list[str],
        averages: bool = False,
    ) -> Self:
        """Before the first step; with `averages`, the moving average is kept too."""
        trained = {path: params[path] for path in trainable}
        average = jax.tree.map(jnp.copy, trained) if averages else None  # or it would be donated twice
        return cls(jnp.zeros((), jnp.int32), params, tx.init(trained), average)

    @property
    def evaluated(self) -> dict[str, jax.Array]:
        """The parameters that are evaluated and exported: their moving average, if there is one."""
        return self.params | (self.ema or {})

    def parts(self, saved: Collection[str]) -> dict[str, dict[str, jax.Array]]:
        """As checkpoints hold it: {'params': those of the paths `saved`, 'training': the rest, 'ema': the average, if
        there is one}, each by path."""
        rest = jax.tree.leaves_with_path(dataclasses.replace(self, params={}, ema=None))
        named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in rest}
        average = {} if self.ema is None else {"ema": self.ema}
        return {"params": {path: self.params[path] for path in saved}, "training": named} | average

    def with_parts(self, parts: dict[str, dict[str, jax.Array]]) -> Self:
        """A state of this structure with other arrays; parameters that no part has stay."""
        structure = jax.tree.structure(dataclasses.replace(self, params={}, ema=None))
        rest = jax.tree.unflatten(structure, [parts["training"][path] for path in self.parts(())["training"]])
        return dataclasses.replace(rest, params=self.params | parts["params"], ema=parts.get("ema"))
