"""The text fields of an image file, with everything that is needed to sample the image again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nabla_gfn_jax import __version__
from nabla_gfn_jax.inference.candidates import Candidates
from nabla_gfn_jax.inference.sampling import Sampling


def recipes(
    model: str,
    loras: Mapping[str, float],
    how: Sampling,
    prompts: Sequence[str],
    num: int,
    size: Sequence[int],
    value: tuple[str, float] | None = None,
    candidates: Candidates | None = None,
) -> Iterator[dict[str, str]]:
    """The text fields by keyword for each of `num` images of each prompt, prompt by prompt.

    "nabla_gfn_jax" has everything as JSON. "parameters" has the same in the form that image viewers and web interfaces
    show.

    Args:
        model: name of the base model.
        loras: the strength of each LoRA, by its name.
        how: how the images were sampled.
        prompts: the prompts.
        num: images per prompt.
        size: height and width in pixels.
        value: the file of the log value that the base model follows, and by which factor.
        candidates: those among which each image was chosen.
    """
    whole = {"version": __version__, "model": model, "loras": dict(loras), **asdict(how)}
    whole |= {"height": size[0], "width": size[1]} | ({"value": dict([value])} if value else {})
    whole |= candidates.about if candidates else {}
    for place, prompt in enumerate(prompts):
        for image in range(num):
            recipe = whole | {"prompt": prompt, "prompt_number": place, "image_number": image}
            yield {"parameters": _parameters(recipe), "nabla_gfn_jax": json.dumps(recipe)}


def _parameters(recipe: Mapping[str, Any]) -> str:
    prompt = recipe["prompt"] + "".join(f" <lora:{name}:{strength:g}>" for name, strength in recipe["loras"].items())
    lines = [prompt, *([f"Negative prompt: {recipe['negative']}"] if recipe["negative"] else [])]
    said = {
        "Steps": recipe["steps"],
        "Sampler": recipe["sampler"],
        "CFG scale": recipe["guidance"],
        "Seed": recipe["seed"],
        "Size": f"{recipe['width']}x{recipe['height']}",
        "Model": recipe["model"],
    }
    if "value" in recipe:
        said["Value"] = " and ".join(f"{name} x {scale:g}" for name, scale in recipe["value"].items())
    if "candidates" in recipe:
        said["Candidates"] = "{number} by {reward} at beta {beta:g}".format(**recipe["candidates"])
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in said.items())])
