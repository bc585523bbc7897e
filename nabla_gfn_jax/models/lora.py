"""LoRA (Hu et al. 2021) as a separate tree: the adapted layers, and the initialisation."""

import zlib
from typing import Literal

import jax
import jax.numpy as jnp

from nabla_gfn_jax.typing import Params, PRNGKey

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the four projections of every attention, as in the paper
# Those four; every linear layer and convolution; or those of the U-Net's upward half, so that no gradient has to go
# through the other half.
Layers = Literal["attention", "all", "up_blocks"]


def is_adapted(path: tuple[str, ...], layers: Layers) -> bool:
    """Whether the layer with this path in the parameters, which has a kernel, gets a LoRA."""
    return layers == "all" or (path[-1] in TARGETS if layers == "attention" else path[0].startswith("up_blocks."))


def init_lora(key: PRNGKey, params: Params, rank: int, layers: Layers = "attention") -> Params:
    """A `lora` collection for a model with these `params`: down (in, rank) ~ N(0, 1/rank²), up (rank, out) = 0,
    float32. The down of a convolution is (height, width, in, rank).

    Because `up` is zero, the policy starts exactly as the base model. `params` may be shapes only.
    """

    def walk(path: tuple[str, ...], tree: Params) -> Params:
        lora = {}
        for name, child in tree.items():
            if isinstance(child, dict) and "kernel" in child and is_adapted((*path, name), layers):
                *inputs, outputs = child["kernel"].shape
                layer_key = jax.random.fold_in(key, zlib.crc32(".".join((*path, name)).encode()))
                down = jax.random.normal(layer_key, (*inputs, rank), jnp.float32) / rank
                lora[name] = {"down": down, "up": jnp.zeros((rank, outputs), jnp.float32)}
            elif isinstance(child, dict) and (found := walk((*path, name), child)):
                lora[name] = found
        return lora

    return walk((), params)
