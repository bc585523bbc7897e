"""What a picture's file says of how it was drawn: enough to draw it again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nabla_gfn_jax import __version__
from nabla_gfn_jax.inference.sampling import Sampling


def recipes(
    model: str,
    loras: Mapping[str, float],
    how: Sampling,
    prompts: Sequence[str],
    num: int,
    size: Sequence[int],
) -> Iterator[dict[str, str]]:
    """Of each of `num` images of each prompt, in their order, what is to stand in its PNG, by keyword.

    "nabla_gfn_jax" has everything, as JSON; "parameters" the same as image viewers and web interfaces show it.

    Args:
        loras: strength of each, by its name.
        size: height and width in pixels.
    """
    whole = {"version": __version__, "model": model, "loras": dict(loras), **asdict(how)}
    whole |= {"height": size[0], "width": size[1]}
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
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in said.items())])
