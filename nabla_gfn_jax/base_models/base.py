"""The protocol of base models: encode prompts into a table of conditions, predict, and decode latents into images.

All sampling and finetuning uses this protocol, which `stable_diffusion.py` implements. A model with other networks or
another chain, such as a rectified flow, needs one more file like it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from nabla_gfn_jax.diffusion.chain import Chain, Level
from nabla_gfn_jax.diffusion.sampler import Predict, PredictChange
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.models.lora import Layers
from nabla_gfn_jax.typing import Images, Latents, Params, PerSample, PRNGKey, PromptIds

Table: TypeAlias = PyTree[Any]  # arrays with the features of prompts for a network; a prompt's id is its row

FEW_PROMPTS = 2048  # so many have the features of all in memory; of more, those of the prompts in use are encoded


def window(ids: Int[np.ndarray, " n"], size: int) -> tuple[Int[np.ndarray, " size"], Int[np.ndarray, " n"]]:
    """The different prompt ids, filled up to `size` of them, and the place among them of each of `ids`."""
    rows, places = np.unique(ids, return_inverse=True)
    return np.pad(rows, (0, size - len(rows)), mode="edge"), places.astype(np.int32)


@runtime_checkable
class HeadNetwork(Protocol):
    """A network of an algorithm's head.

    Its initial output is zero; the shape is that of x, or (B,) for a scalar head.
    """

    def init(self, key: PRNGKey) -> Params:
        """New parameters φ, for which the output is zero."""

    def apply(self, phi: Params, x: Latents, level: Level, table: Table, prompt_id: PromptIds) -> Latents | PerSample:
        """h_φ(x, level) for the prompts `prompt_id` of the table."""


@runtime_checkable
class BaseModel(Protocol):
    """A text-to-image diffusion model.

    The parameters are arguments of its functions, so that they are not constants of compiled programs.
    """

    @property
    def params(self) -> Params:
        """All parameters; they may be shapes only."""

    @property
    def frozen_params(self) -> Params:
        """The parameters that `predict` and `decode` use."""

    @property
    def dtype(self) -> Any:
        """The type in which `predict` computes."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent: height, width, channels."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image: height, width, 3."""

    def chain(self, num_steps: int, *, sampler: Sampler = "ddpm", eta: float = 1.0) -> Chain:
        """The steps of a sampler. Raises `UserError` if the model does not support it."""

    def encode_prompts(self, prompts: Sequence[str], *, negative: str = "", lora: Params | None = None) -> Table:
        """The table of the prompts, on the host. `negative` is the negative prompt, `lora` the text encoder's LoRA."""

    def abstract_table(self, num_prompts: int) -> Table:
        """The shapes of the table of `num_prompts` prompts."""

    def predict(
        self,
        params: Params,
        lora: Params | None,
        x: Latents,
        level: Level,
        table: Table,
        prompt_id: PromptIds,
        guidance: float,
    ) -> Latents:
        """The guided output o_u + w(o_c − o_u) in float32, w = `guidance`. With `lora` None it is the base model's."""

    def predict_change(
        self,
        params: Params,
        lora: Params,
        x: Latents,
        level: Level,
        table: Table,
        prompt_id: PromptIds,
        guidance: float,
    ) -> tuple[Latents, Latents]:
        """(o_#, o_θ − o_#), guided. The rounding error of the change is relative to the change."""

    def decode(self, params: Params, latents: Latents) -> Images:
        """Images (B, height, width, 3), clamped to [0, 1], float32."""

    def init_lora(self, key: PRNGKey, rank: int, layers: Layers = "attention") -> Params:
        """A new LoRA on the attention layers or on all layers, which does not change the model's output."""

    def head(self, kind: str, options: Mapping[str, Any]) -> HeadNetwork:
        """A network for a head of an algorithm; `kind` is "vector" or "scalar"."""

    def on(self, platform: str, *, remat: bool) -> "BaseModel":
        """The model configured for a platform ("cpu", "gpu", "tpu"). Numbers change only by rounding."""


def predictor(model: BaseModel, params: Params, table: Table, guidance: float) -> Predict:
    """The model's `predict` in the form of `Predict`, with prompt ids as the condition."""

    def predict(lora: Params | None, x: Latents, level: Level, condition: PromptIds) -> Latents:
        return model.predict(params, lora, x, level, table, condition, guidance)

    return predict


def change_predictor(model: BaseModel, params: Params, table: Table, guidance: float) -> PredictChange | None:
    """The model's `predict_change` in the form of `PredictChange`, with prompt ids as the condition.

    None if the model computes in float32, because subtracting two outputs is then accurate enough.
    """
    if model.dtype == jnp.float32:
        return None

    def predict_change(lora: Params, x: Latents, level: Level, condition: PromptIds) -> tuple[Latents, Latents]:
        return model.predict_change(params, lora, x, level, table, condition, guidance)

    return predict_change
