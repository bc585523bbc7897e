"""Normalised features of prompts from a text tower. A prompt is encoded once, if there are not very many."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nabla_gfn_jax.models.open_clip import Embeddings
from nabla_gfn_jax.typing import Params

_ENCODED_TOGETHER = 32  # prompts
_KEPT = 4096  # prompts whose features are kept; of more, the oldest are encoded again


def prompt_encoder(
    tower: Callable[[Params, Int[Array, "batch tokens"]], Embeddings],
    params: Params,
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "batch tokens"]],
) -> Callable[[list[str]], Embeddings]:
    """A function from prompts to the tower's normalised features (B, embedding), float32.

    The weights stay in the host's memory in their stored type.
    """
    known: dict[str, np.ndarray] = {}

    @jax.jit
    def run(params: Params, ids: Int[Array, "batch tokens"]) -> Embeddings:
        exact = jax.tree.map(lambda a: a.astype(jnp.float32), params)
        with jax.default_matmul_precision("highest"):
            return unit(tower(exact, ids))

    def encode(prompts: list[str]) -> Embeddings:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        on_device = jax.device_put(params) if new else None
        for start in range(0, len(new), _ENCODED_TOGETHER):
            batch = new[start : start + _ENCODED_TOGETHER]
            padded = batch + [""] * (_ENCODED_TOGETHER - len(batch))
            features = np.asarray(run(on_device, tokenize(padded)))
            known.update(zip(batch, features, strict=False))
        found = jnp.stack([known[prompt] for prompt in prompts])
        for prompt in list(known)[:-_KEPT]:
            del known[prompt]
        return found

    return encode


def unit(features: Embeddings) -> Embeddings:
    """Each feature vector divided by its norm."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
