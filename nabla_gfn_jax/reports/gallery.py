"""The pictures of a report: one sheet for each policy, reduced until all of them fit a size."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nabla_gfn_jax.reports.source import Run
from nabla_gfn_jax.runs.pictures import Picture, Pictures, sheet, shrunk

_SIDES = (192, 144, 112, 80, 64)  # pixels of a picture's longer side, tried in this order
_QUALITY = 82  # of WebP
LARGEST = 3_000_000  # bytes of all sheets together


@dataclass(frozen=True)
class Sheet:
    """The pictures of a policy. `rows` has the place of each picture of the gallery on the sheet; -1: it is not there.

    `scores` are in the order of the gallery; None for a picture that is not there.
    """

    source: str  # a data URI
    width: int  # of a picture, in pixels
    height: int
    columns: int
    rows: list[int]
    scores: dict[str, list[float | None]]


@dataclass(frozen=True)
class Gallery:
    """Pictures by run and number of updates, of the same prompts and noises."""

    of: list[Picture]
    sheets: list[Sheet]
    policies: list[dict[int, int]]  # of each run: the sheet by the number of updates, in ascending order
    bases: list[int | None]  # of each run: the base model's sheet


def gallery(runs: Sequence[Run]) -> Gallery | None:
    """The pictures of all runs; None if there are none. If the smallest pictures do not fit, updates are left out."""
    if not any(run.pictures for run in runs):
        return None
    shown = [dict(run.pictures) for run in runs]
    bases = [run.base for run in runs]
    for side in _SIDES:
        made = _Sheets(side)
        found = made.of(shown, bases)
        if made.size <= LARGEST:
            return found
    while made.size > LARGEST and any(len(policies) > 2 for policies in shown):
        shown = [_every_second(policies) for policies in shown]
        made = _Sheets(_SIDES[-1])
        found = made.of(shown, bases)
    return found


def _every_second(policies: dict[int, Pictures]) -> dict[int, Pictures]:
    """Every second policy from the first on, and the last."""
    updates = list(policies)
    kept = sorted({*updates[::2], updates[-1]}) if len(updates) > 2 else updates
    return {number: policies[number] for number in kept}


class _Sheets:
    """Encodes sheets with pictures of at most `side` pixels. Equal sheets are kept once."""

    def __init__(self, side: int):
        self._side, self._sheets, self._known, self.size = side, list[Sheet](), dict[str, int](), 0

    def of(self, shown: Sequence[dict[int, Pictures]], bases: Sequence[Pictures | None]) -> Gallery:
        all_of = [*(p for policies in shown for p in policies.values()), *(base for base in bases if base is not None)]
        order = sorted(dict.fromkeys(picture for p in all_of for picture in p.of), key=lambda p: (p.place, p.number))
        policies = [{u: self._add(p, order) for u, p in of_run.items()} for of_run in shown]
        return Gallery(order, self._sheets, policies, [None if b is None else self._add(b, order) for b in bases])

    def _add(self, pictures: Pictures, order: Sequence[Picture]) -> int:
        images = shrunk(pictures.images, self._side)
        source = _webp(sheet(images))
        rows = [pictures.of.index(picture) if picture in pictures.of else -1 for picture in order]
        scores = {name: list(_placed(values, rows)) for name, values in pictures.scores.items()}
        key = f"{source}{rows}{scores}"
        if key not in self._known:
            height, width = images.shape[1:3]
            self._known[key] = len(self._sheets)
            self._sheets.append(Sheet(source, width, height, sheet(images).shape[1] // width, rows, scores))
            self.size += len(source)
        return self._known[key]


def _placed(values: Sequence[float], rows: Sequence[int]) -> Iterator[float | None]:
    for row in rows:
        yield values[row] if row >= 0 and np.isfinite(values[row]) else None


def _webp(pixels: np.ndarray) -> str:
    contents = io.BytesIO()
    Image.fromarray(pixels).save(contents, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(contents.getvalue()).decode()
