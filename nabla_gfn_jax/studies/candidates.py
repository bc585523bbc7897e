"""How near the base model comes to P_base · R^β by choosing among K candidates, for several K.

    python -m nabla_gfn_jax.studies.candidates --out=runs/candidates

Base paths are sampled once, or read from the folder of another study (--bank). Every K of the first half are candidates
for one image (`inference/candidates.py`), which takes no training. The other half says what its mean log R needs
(docs/nats.md). What a finetuned model of some gap saves can be read off: the candidates of the base model with that
gap.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.inference.candidates import weigh
from nabla_gfn_jax.inference.table import show
from nabla_gfn_jax.metrics.certificate import Paths, certify
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.bank import BANK, PathOptions, first_half, sample_bank
from nabla_gfn_jax.studies.images import Images, write_results


@dataclass(frozen=True, kw_only=True)
class Options(PathOptions):
    """The base paths, the numbers of candidates, and the folder for the results."""

    out: Path = option(meaning="folder for the table")
    candidates: tuple[int, ...] = option((1, 2, 4, 8, 16), "numbers of candidates", minimum=1, maximum=4096)

    def check_paths(self, prompts: int) -> None:
        """Raises `UserError` if there are too few paths for two images of each prompt."""
        if self.paths < (least := 4 * max(self.candidates) * prompts):
            raise UserError(f"--paths = {self.paths} is too few for two images of each prompt; use {least} or more")


class Row(NamedTuple):
    """What the images of K candidates reach; the figures are those of the certificate."""

    candidates: int
    images: int
    log_reward: Estimate
    exponent: Estimate
    needed: Estimate
    spent: Estimate
    efficiency: Estimate
    gap: Estimate
    share: Estimate


def row_of(number: int, mine: Paths, others: Paths, beta: float) -> Row:
    """One image of every `number` of the samples `mine` of a prompt, judged by the samples `others`.

    The figures at `beta` are linear in log R and in the log ratio of the chosen image; both are means over all choices.
    """
    chosen = []
    for prompt in np.unique(mine.prompt):
        own = np.flatnonzero(mine.prompt == prompt)
        groups = own[: len(own) // number * number].reshape(-1, number)
        shares, log_mean = weigh(mine.log_reward[groups], mine.log_ratio[groups], beta)
        log_reward = (shares * mine.log_reward[groups]).sum(axis=1)
        log_ratio = log_mean - beta * log_reward
        chosen.append((log_reward, -log_ratio[:, None], log_ratio, mine.prompt[groups[:, 0]]))
    paths = Paths(*(np.concatenate(arrays) for arrays in zip(*chosen, strict=True)))
    found = certify(paths, others, beta)
    assert found.at_beta is not None
    figures = found.log_reward, found.exponent, found.needed, found.spent, found.efficiency
    return Row(number, len(paths.prompt), *figures, found.at_beta.gap, found.at_beta.effective_share)


def as_table(rows: list[Row], beta: float) -> str:
    """The rows as a Markdown table."""
    names = "K", "images", "log R", "exponent", "needed", "spent", "efficiency", f"gap at β = {beta:g}", "share"
    lines = [names, ["---"] * len(names)]
    lines += [[str(row.candidates), str(row.images), *map(show, row[2:])] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the paths, chooses among them for each K, and writes a line of JSON for each K and the table."""
    o = parse(argv, Options, __doc__)
    images = Images.load(o)
    o.check_paths(len(images.prompts))
    bank = sample_bank(images, BANK, o.paths, o.together, o.bank)
    first = first_half(o.paths, len(images.prompts))
    mine, others = (
        Paths.of_base(np.asarray(bank.log_reward[half], np.float64), bank.prompt_id[half]) for half in (first, ~first)
    )
    rows = [row_of(number, mine, others, o.beta) for number in o.candidates]
    write_results(o.out, "candidates", rows, as_table(rows, o.beta))


if __name__ == "__main__":
    main(sys.argv)
