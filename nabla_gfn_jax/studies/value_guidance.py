"""The policy that follows a learned log value exactly: no LoRA stands between them.

    python -m nabla_gfn_jax.studies.value_guidance --out=runs/value_guidance

Base paths are sampled once, and the log value V of their states is fitted (`studies/bank.py`). The policy shifts its
step by δ = s σ ∇_x V(x̂_#(x)) (`algorithms/value_guide.py`), which is what a perfect pupil would do. Its certificate
therefore says what the teacher is worth, and the difference to a LoRA's (`studies/value_fit.py`) says what the pupil is
worth. No gradient of the reward is taken.

The policy's steps need not be those of the bank. A step can only move its mean, so shorter steps follow V better. The
policy is judged by base samples of its own steps, those of the bank among them if it takes the same. samples.png shows
the base model's samples above the policy's, from the same noise. value.safetensors is V, for `sample --value` and
`evaluate --value`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nabla_gfn_jax.algorithms.value_guide import ValueGuide, save_guide
from nabla_gfn_jax.algorithms.value_memory import Fit
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.images import save_grid
from nabla_gfn_jax.inference.subject import hashes_of
from nabla_gfn_jax.metrics.certificate import Paths
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.bank import (
    BANK,
    BankOptions,
    Memories,
    certify,
    clean_of,
    fit_halves,
    held_out_paths,
    sample_bank,
)
from nabla_gfn_jax.studies.images import Images


@dataclass(frozen=True, kw_only=True)
class Options(BankOptions):
    """The paths, how V is fitted to them, how it is followed, and the folder for the results."""

    out: Path = option(meaning="folder for V, the certificates and two rows of samples")
    scale: float = option(1.1, "s, by which V's gradient is multiplied", above=0, maximum=100)
    step_nats: float = option(0.5, "most nats that a step of a sample spends", above=0, infinite=True)
    steps: int | None = option(None, "the policy's sampling steps [num_steps, as V's]", minimum=1, maximum=999)
    sampler: Sampler = option("ddpm", "which times these steps visit")

    @property
    def takes_the_banks_steps(self) -> bool:
        """Whether the policy's steps are those of the bank, so that the bank's paths are base paths of it too."""
        return self.sampler == "ddpm" and self.steps in (None, self.num_steps)


def guide_of(images: Images, o: Options, memories: Memories) -> ValueGuide:
    """The policy that follows what the memories have learned, in the first steps of the bank."""
    times = np.asarray(images.base.chain(o.num_steps).at.time, np.float32)
    return ValueGuide.of(memories, times[: o.last_step], o.scale, o.step_nats)


def about(o: Options) -> dict[str, Any]:
    """The description in the header of the guide's file, in the words of a LoRA's."""
    how = {"sampler": o.sampler, "num_steps": o.steps or o.num_steps, "guidance": o.guidance}
    what = {"model": o.model, "prompts": o.prompts, "reward": o.reward, "beta": o.beta}
    return what | how | {"inputs": hashes_of(o.model)}


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the bank, fits V, samples the policy that follows it, and judges it."""
    o = parse(argv, Options, __doc__)
    images = Images.load(o)
    o.check_paths(len(images.prompts))
    chain = images.base.chain(o.steps or o.num_steps, sampler=o.sampler)
    o.out.mkdir(parents=True, exist_ok=True)
    bank = sample_bank(images, BANK, o.paths, o.together, o.bank)
    clean = clean_of(images.base.chain(o.num_steps), bank)
    guide = guide_of(images, o, fit_halves(Fit(o, o.paths), clean, bank, o.beta, len(images.prompts)))
    log_reward, prompt_id = bank.log_reward, bank.prompt_id
    del bank, clean  # some GB
    save_guide(o.out / "value.safetensors", guide, images.prompts, about(o))

    base, before = held_out_paths(images, o, None, chain)
    own, after = held_out_paths(images, o, guide, chain)
    known = base
    if o.takes_the_banks_steps:
        known = Paths.of_base(np.r_[base.log_reward, log_reward], np.r_[base.prompt, prompt_id])
    certify(o.beta, "the base model", base, known, o.out / "base.json")
    certify(o.beta, "the policy that follows V", own, known, o.out / "certificate.json")
    zoom = max(1, 128 // before.shape[1])
    save_grid(o.out / "samples.png", np.concatenate([before, after]), columns=len(before), zoom=zoom)


if __name__ == "__main__":
    main(sys.argv)
