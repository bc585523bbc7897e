"""Counts the floating-point operations of a traced program: matrix products, convolutions and attention.

The count of a loop's body is multiplied by the loop's length; compilers count it once. Results that are not used are
not counted, because compilers remove them too. Operations of other kinds are not counted; in a UNet they are less than
a hundredth.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

# cuDNN's attention on (batch, length, heads, width): two products forward; backward the scores again and four more.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}

FULL = "float32 at full precision"  # with `jax.default_matmul_precision("highest")`; otherwise operands are rounded


def count_flops(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """FLOPs of one call by the operands' type. A multiplication with addition counts as two.

    Under `shard_map` the count is for one device. Arguments may be `jax.ShapeDtypeStruct`s.
    """
    return flops_of(jax.make_jaxpr(function)(*arguments))


def flops_of(traced: ClosedJaxpr) -> dict[str, float]:
    """As `count_flops`, for a program that is already traced (`jitted.trace(*arguments).jaxpr`)."""
    used, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return dict(_of_program(used))


def _of_program(program: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for equation in program.eqns:
        total.update(_of_equation(equation))
    return total


def _of_equation(equation: Any) -> Counter[str]:
    name = equation.primitive.name
    kind = _kind(equation) if name in ("dot_general", "conv_general_dilated") else ""
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return Counter({kind: 2.0 * depth * math.prod(equation.outvars[0].aval.shape)})
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return Counter({kind: 2.0 * math.prod(kernel) / outputs * math.prod(equation.outvars[0].aval.shape)})
    if name in _CUDNN_PRODUCTS:
        q, k = (operand.aval for operand in equation.invars[:2])
        return Counter({str(q.dtype): 2.0 * _CUDNN_PRODUCTS[name] * math.prod(q.shape) * k.shape[1]})
    inner = [_of_program(program) for program in _programs_in(equation.params)]
    if name == "cond":  # only one branch runs; the costliest is counted
        return max(inner, key=Counter.total, default=Counter())
    times = equation.params["length"] if name == "scan" else 1
    whole = sum(inner, Counter[str]())
    return Counter({kind: times * flops for kind, flops in whole.items()})


def _kind(equation: Any) -> str:
    """The operands' type, or FULL for float32 with the precision "highest"."""
    kind = str(equation.invars[0].aval.dtype)
    return FULL if kind == "float32" and "HIGHEST" in str(equation.params["precision"]) else kind


def _programs_in(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
