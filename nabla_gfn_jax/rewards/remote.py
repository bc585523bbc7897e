"""A reward that a server computes from a batch of PNG files and prompts.

The request is a POST of JSON, {"images": [a PNG in base64, …], "prompts": [text, …]}. The answer is JSON,
{"scores": [number, …]}, with one number per image.
"""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.images import levels
from nabla_gfn_jax.rewards.host import host_reward
from nabla_gfn_jax.rewards.reward import Reward

SECONDS = 60.0  # for a batch
_FIRST_SECONDS = 8.0  # for the grey image that tests the server
_TRIES = 3
_PAUSE = 1.0  # seconds before the second try; twice as long before the third


def remote(url: str) -> Reward:
    """The reward that the server at `url` computes. Raises `UserError` within seconds if the server does not answer."""
    ask(url, np.full((1, 64, 64, 3), 0.5, np.float32), [""], _FIRST_SECONDS, tries=1)
    return host_reward(lambda images, prompts: ask(url, images, prompts), f"the reward at {url}")


def ask(
    url: str,
    images: Float[np.ndarray, "batch height width 3"],
    prompts: Sequence[str],
    seconds: float = SECONDS,
    tries: int = _TRIES,
) -> list[float]:
    """The scores of images in [0, 1].

    Raises `UserError` if the server is down or too slow, or its answer is invalid.
    """
    body = json.dumps({"images": [_png(image) for image in images], "prompts": list(prompts)}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return _scores(answer.read(), url, len(images))
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
            why = str(error) if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it keeps the connection open
            if attempt + 1 == tries:
                raise UserError(f"the reward at {url} does not answer ({why}); start its server and resume") from error
            time.sleep(_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _scores(answer: bytes, url: str, count: int) -> list[float]:
    try:
        scores = [float(score) for score in json.loads(answer)["scores"]]
        if len(scores) != count:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        form = f'{{"scores": [a number for each of {count} images]}}'
        raise UserError(f"the reward at {url} answers {answer[:80]!r}; it must be {form}") from None
    return scores


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(levels(image)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
