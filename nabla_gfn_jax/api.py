"""The functions for notebooks and other programs.

    from nabla_gfn_jax import api

    model = api.load_model("emoji")
    images = api.sample(model, ["a face"], num=4, guidance=2)
    print(api.score("valence", images[0], ["a face"] * 4))
    run = api.finetune("emoji", "runs/mine", {"training.num_epochs": 20}, on_epoch=print)
    lora = api.load_lora(run / "lora/00080", model)  # after 20 epochs of 4 updates

Arguments mean the same as the options of the commands. An input that is not allowed raises
`nabla_gfn_jax.errors.UserError`, whose text is one line.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nabla_gfn_jax import train
from nabla_gfn_jax.algorithms.value_guide import ValueGuide, load_guide
from nabla_gfn_jax.base_models import names
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion
from nabla_gfn_jax.checkpoints import lora_file
from nabla_gfn_jax.command_line import default_workdir, load_settings
from nabla_gfn_jax.inference.candidates import Candidates, draw_images
from nabla_gfn_jax.inference.evaluation import Evaluation, Evaluator
from nabla_gfn_jax.inference.extras import load_extras
from nabla_gfn_jax.inference.sampling import ImageSampler, Policy, Sampling
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

__all__ = ["evaluate", "finetune", "load_lora", "load_model", "load_value", "sample", "score"]


def load_model(name: str, dtype: str = "float32") -> StableDiffusion:
    """Loads a base model: "emoji", a folder in diffusers' layout, a file, or OWNER/NAME on the hub.

    `dtype` is "float32" or "bfloat16". Raises `UserError` if the model does not load.
    """
    return names.load_model(name, names.DTYPES[dtype])


def load_lora(path: str | Path, model: StableDiffusion) -> Params:
    """Loads a LoRA from a file or folder of any layout in docs/files.md, for `sample` and `evaluate`.

    `nabla_gfn_jax.inference.sampling.scaled` changes its strength and `nabla_gfn_jax.inference.sampling.combined` adds
    several. Raises `UserError` if the file does not load or does not fit the model.
    """
    return lora_file.load_lora(Path(path).expanduser(), model.params["unet"], model.params["text_encoder"])


def load_value(
    path: str | Path, model: StableDiffusion, prompts: Sequence[str], scale: float | None = None
) -> ValueGuide:
    """Loads a log value of `nabla_gfn_jax.studies.value_guidance`, which `sample` and `evaluate` take as their `lora`.

    `prompts` must be those that are then sampled, and `scale` replaces the factor in the file. Raises `UserError` if
    the file does not load, knows nothing of a prompt, or is of another model.
    """
    return load_guide(Path(path).expanduser(), prompts, math.prod(model.latent_shape), scale)


def sample(
    model: StableDiffusion,
    prompts: Sequence[str],
    *,
    num: int = 1,
    lora: Policy | None = None,
    candidates: int = 1,
    reward: str | None = None,
    beta: float | None = None,
    **how: Any,
) -> Float[np.ndarray, "prompts num height width 3"]:
    """Samples `num` images of each prompt, in [0, 1].

    Each image is one of some `candidates`, chosen in proportion to R^β (`nabla_gfn_jax.inference.candidates`). More
    than one need a `reward` and a `beta`. `how` are fields of `nabla_gfn_jax.inference.sampling.Sampling`: sampler,
    steps, guidance, eta, seed, negative, lora_from_step, lora_until_step.
    """
    among = Candidates.of(candidates, reward or "", load_reward(reward) if reward else None, beta, prompts)
    batches = draw_images(ImageSampler(model, prompts, Sampling(**how)), lora, num, among)
    return np.concatenate([batch.images for batch in batches]).reshape(len(prompts), num, *model.image_shape)


def score(
    reward: str, images: Float[np.ndarray, "n height width 3"], prompts: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """log R of each image in [0, 1] for its prompt, without β. `reward` is written as on the command line."""
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
    lora: Policy | None,
    num: int = 512,
    beta: float | None = None,
    candidates: int = 1,
    cross_rewards: Sequence[str] = (),
    metrics: Sequence[str] = (),
    **how: Any,
) -> Evaluation:
    """Compares a LoRA with the base model on `num` images of each prompt, sampled from the same noise.

    The result has `figures` and a `certificate` in nats. `beta` is the exponent of the target P_base · R^β,
    `cross_rewards` and `metrics` are those of `nabla-gfn evaluate` (docs/metrics.md), and `candidates` and `how` are as
    in `sample`.
    """
    extras = load_extras(cross_rewards, metrics, reward)
    judge = load_reward(reward)
    evaluator = Evaluator(ImageSampler(model, prompts, Sampling(**how)), judge, beta, extras.metrics)
    among = Candidates.of(candidates, reward, judge, beta, prompts)
    base = evaluator.base_states(evaluator.base_images(num), None, {})
    return evaluator.evaluate(evaluator.states(lora, num, candidates=among), base, num)


def finetune(
    config: str = "emoji",
    workdir: str | Path | None = None,
    fields: Mapping[str, Any] | None = None,
    *,
    on_epoch: Callable[[Row], None] | None = None,
) -> Path:
    """Runs a config to its end, or resumes an earlier run in the same workdir. Returns the workdir.

    Args:
        config: name of a shipped config, or a Python file; append :VARIANT to choose a variant.
        workdir: the run's folder; runs/CONFIG-VARIANT/seedN if None.
        fields: values of the config's fields by full name, such as "training.num_epochs".
        on_epoch: is called with each epoch's row of `metrics.jsonl`. A KeyboardInterrupt that it raises ends the run as
            Ctrl-C would: after a save.

    Raises:
        UserError: a value is not allowed, an input is missing, or the workdir holds another run.
    """
    settings = load_settings(Settings, config, fields)
    path = Path(workdir).expanduser() if workdir is not None else default_workdir(config, settings.seed)
    check(settings)
    with claim(path, flatten(settings), free_fields(settings), about(settings)) as claimed:
        if not is_finished(claimed, length(settings)):
            train.finetune(settings, claimed, on_epoch=on_epoch)
    return path
