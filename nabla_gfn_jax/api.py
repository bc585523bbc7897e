"""What notebooks and other programs call.

    from nabla_gfn_jax import api

    model = api.load_model("emoji")
    images = api.sample(model, ["a face"], num=4, guidance=2)
    print(api.score("valence", images[0], ["a face"] * 4))
    run = api.finetune("emoji", "runs/mine", {"training.num_epochs": 20}, on_epoch=print)
    lora = api.load_lora(run / "lora/00020", model)

All take what the commands take, and raise `errors.UserError`, whose text is one line, for what is wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nabla_gfn_jax import train
from nabla_gfn_jax.base_models import names
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion
from nabla_gfn_jax.checkpoints import lora_file
from nabla_gfn_jax.command_line import default_workdir, load_settings
from nabla_gfn_jax.inference.evaluation import Evaluation, Evaluator
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling
from nabla_gfn_jax.metrics.base import Batch
from nabla_gfn_jax.metrics.reward import LogReward
from nabla_gfn_jax.options import flatten
from nabla_gfn_jax.rewards import TOTAL, load_reward
from nabla_gfn_jax.runs.workdir import claim
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import about, check, free_fields, length
from nabla_gfn_jax.training.loop import Row
from nabla_gfn_jax.training.outputs import is_finished
from nabla_gfn_jax.typing import Params

__all__ = ["evaluate", "finetune", "load_lora", "load_model", "sample", "score"]


def load_model(name: str, dtype: str = "float32") -> StableDiffusion:
    """A base model: "emoji", a folder in diffusers' layout, a file, or OWNER/NAME on the hub.

    `dtype` is "float32" or "bfloat16".
    """
    return names.load_model(name, names.DTYPES[dtype])


def load_lora(path: str | Path, model: StableDiffusion) -> Params:
    """The LoRA in a file or folder of any layout that docs/files.md names, for `sample` and `evaluate`.

    `inference.sampling` has `scaled(lora, strength)` and `combined([lora, lora])`.
    """
    return lora_file.load_lora(Path(path).expanduser(), model.params["unet"], model.params["text_encoder"])


def sample(
    model: StableDiffusion, prompts: Sequence[str], *, num: int = 1, lora: Params | None = None, **how: Any
) -> Float[np.ndarray, "prompts num height width 3"]:
    """`num` images of each prompt, in [0, 1].

    `how`: fields of `inference.sampling.Sampling`: sampler, steps, guidance, eta, seed, negative, lora_from_step,
    lora_until_step.
    """
    batches = ImageSampler(model, prompts, Sampling(**how)).images(lora, num)
    return np.concatenate([batch.images for batch in batches]).reshape(len(prompts), num, *model.image_shape)


def score(
    reward: str, images: Float[np.ndarray, "n height width 3"], prompts: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """log R of each image in [0, 1] for its prompt, not multiplied by β. `reward`: as on the command line."""
    metric, unique = LogReward(load_reward(reward)), list(dict.fromkeys(prompts))
    metric.prepare(unique)
    rows = np.asarray([unique.index(prompt) for prompt in prompts])
    found: Float[np.ndarray, " n"] = metric.update(Batch(np.asarray(images, np.float32), rows)).values[TOTAL]
    return found


def evaluate(
    model: StableDiffusion,
    prompts: Sequence[str],
    *,
    reward: str,
    lora: Params,
    num: int = 512,
    beta: float | None = None,
    **how: Any,
) -> Evaluation:
    """A LoRA beside the base model by `num` images of each prompt with the same noise: `.figures`, `.certificate`.

    `beta`: of the target P_base · R^β; `how`: as for `sample`.
    """
    evaluator = Evaluator(ImageSampler(model, prompts, Sampling(**how)), load_reward(reward), beta)
    base = evaluator.base_states(num, None, {})
    return evaluator.evaluate(evaluator.states(lora, num), base)


def finetune(
    config: str = "emoji",
    workdir: str | Path | None = None,
    fields: Mapping[str, Any] | None = None,
    *,
    on_epoch: Callable[[Row], None] | None = None,
) -> Path:
    """A run to its end, or on from where an earlier call left it; returns its folder.

    Args:
        config: a shipped config's name or a Python file, and :VARIANT.
        workdir: the run's folder; runs/CONFIG-VARIANT/seedN if None.
        fields: values of the config's fields by name, "training.num_epochs" say.
        on_epoch: gets each epoch's row, as `metrics.jsonl` has it. What it raises ends the run as Ctrl-C would.
    """
    settings = load_settings(Settings, config, fields)
    path = Path(workdir).expanduser() if workdir is not None else default_workdir(config, settings.seed)
    check(settings)
    with claim(path, flatten(settings), free_fields(settings), about(settings)) as claimed:
        if not is_finished(claimed, length(settings)):
            train.finetune(settings, claimed, profile=False, on_epoch=on_epoch)
    return path
