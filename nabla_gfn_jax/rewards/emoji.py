"""The emoji model's two rewards: small heads on the middle layers of EfficientNet-Lite0, an ImageNet network.

`emoji.fit_valence` and `emoji.fit_recognisability` fitted the heads to the drawings. They print the accuracy of the
heads and store it in the heads' files.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.checkpoints.files import read_safetensors
from nabla_gfn_jax.data.prompts import SIMPLE_ANIMALS
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models import efficientnet
from nabla_gfn_jax.models.efficientnet import EfficientNetLite
from nabla_gfn_jax.rewards.reward import Reward
from nabla_gfn_jax.typing import Images, Params, PerSample, PRNGKey

DATA = Path(__file__).parent / "data"
NETWORK = EfficientNetLite("lite0")


@cache
def network_params() -> Params:
    """The weights of the layers that `features` uses."""

    def init(key: PRNGKey) -> Params:
        return NETWORK.init(key, jnp.zeros((1, 96, 96, 3)), method="layout")["params"]

    used = jax.eval_shape(init, jax.random.key(0))
    loaded = efficientnet.load("lite0")
    return {name: loaded[name] for name in used}


def features(network: Params, images: Images) -> Float[Array, "batch 1008"]:
    """The network's features at each place of a coarse grid over the image, in float32 or wider."""
    images = images.astype(np.promote_types(images.dtype, np.float32))
    with jax.default_matmul_precision("highest"):
        layout = jnp.asarray(NETWORK.apply({"params": network}, images, method="layout"))
    return layout.reshape(layout.shape[0], -1)


def _load_head(name: str) -> Params:
    tensors, _ = read_safetensors(_head_file(name))
    head = {key: jnp.asarray(tensor.astype(np.float32)) for key, tensor in tensors.items()}
    return {"network": network_params(), **head}


def _head_file(name: str) -> Path:
    return DATA / f"{name}.safetensors"


def _files(name: str) -> tuple[Path, ...]:
    return (_head_file(name), efficientnet.weights_file("lite0"))


def _linear(params: Params, images: Images) -> Float[Array, "batch outputs"]:
    outputs = features(params["network"], images) @ params["kernel"]
    return outputs + params["bias"][None]


def valence() -> Reward:
    """log R = tanh(v), where v predicts the mean sentiment of messages with this emoji (-1 to 1). It ignores prompts.

    The tanh keeps log R on the scale of human ratings, even for images that are far from the drawings.
    """

    def score(params: Params, images: Images, prompts: dict) -> PerSample:
        return jnp.tanh(_linear(params, images)[:, 0])

    return Reward(_load_head("valence"), lambda prompts: {}, score, _files("valence"))


def recognisability() -> Reward:
    """log R = log p(the prompt's animal | image) among the 45 animals of `SIMPLE_ANIMALS` and "something else"."""

    def places(prompts: list[str]) -> list[int]:
        return [_animal(prompt) for prompt in prompts]

    def encode(prompts: list[str]) -> Int[Array, " batch"]:
        return jnp.array(places(prompts), jnp.int32)

    def score(params: Params, images: Images, animal: Int[Array, " batch"]) -> PerSample:
        log_p = jax.nn.log_softmax(_linear(params, images), axis=-1)
        return jnp.take_along_axis(log_p, animal[:, None], axis=-1)[:, 0]

    return Reward(_load_head("recognisability"), encode, score, _files("recognisability"), places)


def _animal(prompt: str) -> int:
    name = prompt.strip().lower().removeprefix("an ").removeprefix("a ")
    if name not in SIMPLE_ANIMALS:
        raise UserError(f"recognisability cannot judge the prompt {prompt!r}; it knows {', '.join(SIMPLE_ANIMALS)}")
    return SIMPLE_ANIMALS.index(name)
