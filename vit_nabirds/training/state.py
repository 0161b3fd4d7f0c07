"""The state of a training."""

import dataclasses
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
    ema: dict[str, jax.Array] | None = None

    @classmethod
    def initial(cls, params: dict[str, jax.Array], tx: optax.GradientTransformation, trainable: list[str]) -> Self:
        """Before the first step."""
        return cls(jnp.zeros((), jnp.int32), params, tx.init({path: params[path] for path in trainable}))

    def parts(self) -> dict[str, dict[str, jax.Array]]:
        """As checkpoints hold it: {'params': by path, 'training': all the rest by path}."""
        rest = jax.tree.leaves_with_path(dataclasses.replace(self, params={}))
        named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in rest}
        return {"params": self.params, "training": named}

    def with_parts(self, parts: dict[str, dict[str, jax.Array]]) -> Self:
        """A state of this structure with other arrays."""
        structure = jax.tree.structure(dataclasses.replace(self, params={}))
        rest = jax.tree.unflatten(structure, [parts["training"][path] for path in self.parts()["training"]])
        return dataclasses.replace(rest, params=parts["params"])
