"""What the matrix products of a traced function cost."""

import math

import jax
from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval


def flops_of_products(jaxpr: Jaxpr) -> int:
    """Floating-point operations of the products that a traced function needs; in `shard_map`, of one device."""
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops(needed)


def _flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("dot_product_attention_"):  # cuDNN's, of (batch, tokens, heads, width)
            query, key = (x.aval.shape for x in equation.invars[:2])
            products = 4 if "bwd" in equation.primitive.name else 2
            total += products * 2 * math.prod(query) * key[1]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += turns * _flops(inner) if hasattr(inner, "eqns") else 0
    return total
