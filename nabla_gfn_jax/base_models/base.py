"""What a base model is: prompts become a table of conditions, a network predicts, latents become images.

Everything that samples or finetunes works with this protocol; `stable_diffusion.py` keeps it. Of a model with other
networks or another chain, such as a rectified flow, that is the file to write beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
from jaxtyping import PyTree

from nabla_gfn_jax.diffusion.chain import Chain, Level
from nabla_gfn_jax.diffusion.sampler import Predict, PredictChange
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.typing import Images, Latents, Params, PerSample, PRNGKey, PromptIds

Table: TypeAlias = PyTree[Any]  # arrays that say all a network needs of some prompts; a prompt's id is its row


@runtime_checkable
class HeadNetwork(Protocol):
    """A network beside the policy, zero as it starts; its output is shaped like x, or is one number a sample."""

    def init(self, key: PRNGKey) -> Params: ...

    def apply(
        self, phi: Params, x: Latents, level: Level, table: Table, prompt_id: PromptIds
    ) -> Latents | PerSample: ...


@runtime_checkable
class BaseModel(Protocol):
    """A text-to-image diffusion model.

    Its functions take the parameters they read, so that inside `jit` these are arguments and not constants.
    """

    @property
    def params(self) -> Params:
        """All parameters, which may be shapes alone."""

    @property
    def frozen_params(self) -> Params:
        """Those that `predict` and `decode` read."""

    @property
    def dtype(self) -> Any:
        """Of the numbers within `predict`."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent: height, width, channels."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image: height, width, 3."""

    def chain(self, num_steps: int, *, sampler: Sampler = "ddpm", eta: float = 1.0) -> Chain:
        """The steps of a sampler. Raises `UserError` for one that the model does not have."""

    def encode_prompts(self, prompts: Sequence[str], *, negative: str = "", lora: Params | None = None) -> Table:
        """The prompts' table, row by row, on the host; guidance leads away from `negative`. `lora`: the encoder's."""

    def abstract_table(self, num_prompts: int) -> Table:
        """Its shapes."""

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
        """The guided output o_u + w(o_c − o_u) in float32, w = `guidance`; the base model's where `lora` is None."""

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
        """The base model's guided output, and the policy's minus it, with an error relative to that difference."""

    def decode(self, params: Params, latents: Latents) -> Images:
        """Images in [0, 1], clamped, float32."""

    def init_lora(self, key: PRNGKey, rank: int) -> Params:
        """A LoRA that leaves the model as it is."""

    def head(self, kind: str, options: Mapping[str, Any]) -> HeadNetwork:
        """A network for one of an algorithm's heads: "vector" or "scalar"."""

    def on(self, platform: str, *, remat: bool) -> "BaseModel":
        """The model as devices of a platform are to run it; no number depends on it but by rounding."""


def predictor(model: BaseModel, params: Params, table: Table, guidance: float) -> Predict:
    """The model's `predict` as samplers and algorithms call it: with prompts' ids for the condition."""

    def predict(lora: Params | None, x: Latents, level: Level, condition: PromptIds) -> Latents:
        return model.predict(params, lora, x, level, table, condition, guidance)

    return predict


def change_predictor(model: BaseModel, params: Params, table: Table, guidance: float) -> PredictChange | None:
    """The same of `predict_change`; None where the model computes in float32 and a difference of outputs will do."""
    if model.dtype == jnp.float32:
        return None

    def predict_change(lora: Params, x: Latents, level: Level, condition: PromptIds) -> tuple[Latents, Latents]:
        return model.predict_change(params, lora, x, level, table, condition, guidance)

    return predict_change
