"""Activations of the base model together with their changes by a LoRA.

In half precision the outputs of the base model and of the policy are rounded independently, so a small difference of
the two is mostly rounding error. Here the difference δ of two activations a and a + δ is carried through the network as
a separate activation. Each kind of layer has an exact rule for it, for a LoRA of any size:

    linear        L(a + δ) − L(a) = L δ
    with a LoRA   δ W + (a + δ) down up
    any other     f(a + δ) − f(a), in float32

The rounding error is relative to δ. The cost is the matrix products of two networks, which is no more than evaluating
both networks.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array


@flax.struct.dataclass
class Pair:
    """An activation of the base model and its change by the LoRA, with the same shape.

    It adds, reshapes and casts as an array does. A plain array added to a pair counts as unchanged by the LoRA.
    """

    base: Any
    change: Any = None  # None: no change, so that layers before the first LoRA cost as much as one network

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def __add__(self, other: "Array | Pair") -> "Pair":
        if not isinstance(other, Pair):
            return Pair(self.base + other, self.change)
        return changed(Pair(self.base + other.base, self.change), other.change)

    def reshape(self, *shape: Any) -> "Pair":
        return linear(lambda a: a.reshape(*shape), self)

    def astype(self, dtype: Any) -> "Pair":
        return linear(lambda a: a.astype(dtype), self)


if TYPE_CHECKING:  # a layer returns an array for an array, which a union type would not express
    Paired: TypeAlias = Any
else:
    Paired = Pair


def policy(x: "Array | Pair") -> Array:
    """The policy's activation, base + change. An array is returned as it is."""
    if not isinstance(x, Pair):
        return x
    return x.base if x.change is None else x.base + x.change


def changed(x: "Array | Pair", amount: Array | None) -> Any:
    """x + amount, where `amount` is a change by the LoRA. An array stays an array."""
    if amount is None:
        return x
    if isinstance(x, Pair):
        return Pair(x.base, amount if x.change is None else x.change + amount)
    return x + amount


def linear(f: Callable[..., Any], *inputs: "Array | Pair") -> Any:
    """f(inputs) for an f that is linear in all inputs jointly. The result is a pair if an input is."""
    if not any(isinstance(x, Pair) for x in inputs):
        return f(*inputs)
    bases, changes = zip(*map(_parts, inputs), strict=True)
    return Pair(f(*bases), None if _all_none(changes) else f(*_filled(bases, changes)))


def nonlinear(f: Callable[..., Any], *inputs: "Array | Pair") -> Any:
    """f(inputs) for an f that is not linear, such as a normalisation. The result is a pair if an input is."""
    if not any(isinstance(x, Pair) for x in inputs):
        return f(*inputs)
    bases, changes = zip(*map(_parts, inputs), strict=True)
    base = f(*bases)
    if _all_none(changes):
        return Pair(base)
    before = [a.astype(jnp.float32) for a in bases]
    after = [a + d.astype(jnp.float32) for a, d in zip(before, _filled(bases, changes), strict=True)]
    return Pair(base, (f(*after) - f(*before)).astype(base.dtype))


def filled(x: Pair) -> Pair:
    """The pair with zeros instead of a change of None."""
    return Pair(x.base, *_filled((x.base,), (x.change,)))


def _parts(x: "Array | Pair") -> tuple[Array, Array | None]:
    return (x.base, x.change) if isinstance(x, Pair) else (x, None)


def _all_none(changes: tuple[Array | None, ...]) -> bool:
    return all(change is None for change in changes)


def _filled(bases: tuple[Array, ...], changes: tuple[Array | None, ...]) -> list[Array]:
    return [jnp.zeros_like(a) if d is None else d for a, d in zip(bases, changes, strict=True)]
