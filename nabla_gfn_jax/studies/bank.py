"""A bank: base paths that are sampled once, the log value V of their states, and samples of what follows it."""

import contextlib
import functools
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from nabla_gfn_jax.algorithms.value_guide import ValueGuide, following
from nabla_gfn_jax.algorithms.value_memory import Fit, FitOptions, Seen, ValueMemory
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.images import levels
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.inference.sampling import Policy
from nabla_gfn_jax.inference.subject import hashes_of
from nabla_gfn_jax.inference.table import show
from nabla_gfn_jax.metrics import certificate
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.foresight import ONCE, Ends, fit_value
from nabla_gfn_jax.studies.images import ImageOptions, Images, PolicyOptions
from nabla_gfn_jax.typing import Params, PRNGKeys, PromptIds

HELD_OUT, BANK = 0, 4  # streams of random numbers; `uptake` samples the first
SHOWN = 16  # samples in a row of pictures


@dataclass(frozen=True, kw_only=True)
class PathOptions(ImageOptions):
    """The base paths."""

    paths: int = option(4096, "base paths in the bank", minimum=4)
    together: int = option(128, "paths sampled together", minimum=1)
    bank: Path | None = option(None, "folder that keeps the base paths, for a study that goes on", file="folder")

    def check_paths(self, prompts: int) -> None:
        """Raises `UserError` if there are too few paths for two halves with all prompts."""
        if self.paths < 2 * prompts:
            raise UserError(f"--paths = {self.paths} is less than two of each prompt; use {2 * prompts} or more")


@dataclass(frozen=True, kw_only=True)
class BankOptions(PathOptions, PolicyOptions, FitOptions):
    """The base paths, and how V is fitted to them."""

    held_out: int = option(1024, "new base paths that judge the policy, and samples of the policy", minimum=2)
    fit_updates: int = option(ONCE, "updates of V's network, for each half of the paths", minimum=1)


class Bank(NamedTuple):
    """Base paths, in the host's memory."""

    x: Float[np.ndarray, "paths states *shape"]
    base_output: Float[np.ndarray, "paths steps *shape"]
    log_reward: Float[np.ndarray, " paths"]
    prompt_id: Int[np.ndarray, " paths"]


class Values(NamedTuple):
    """What the two halves of a bank say of its states, each of the other's."""

    value: Float[np.ndarray, "paths states"]  # V − log Z; at the sample, β log R − log Z
    by_clean: Float[np.ndarray, "paths steps elements"]  # ∂V/∂x̂ at every state but the sample


Memories = tuple[ValueMemory, ValueMemory]  # of V; each half of the paths is asked of its own, which has not seen it


def sample_bank(images: Images, stream: int, count: int, together: int, keep: Path | None = None) -> Bank:
    """Samples `count` base paths, some at a time. Those that the folder `keep` has are read, the others are kept there.

    Raises:
        UserError: the folder is of other paths, or cannot be written.
    """

    @jax.jit
    def part(frozen: Params, keys: PRNGKeys, ids: PromptIds) -> Bank:
        model = images.model(frozen)
        path = sample(model.predict, None, model.chain, keys, images.base.latent_shape, ids)
        by_path = functools.partial(jnp.moveaxis, source=0, destination=1)
        return Bank(by_path(path.latents), by_path(path.outputs), model.log_reward(path.samples, ids), ids)  # type: ignore[arg-type]

    def sampled(start: int) -> Bank:
        keys, ids = images.keys(stream, start, min(together, count - start))
        return jax.tree.map(np.asarray, part(images.frozen, keys, ids))  # type: ignore[no-any-return]

    kept = None if keep is None else _Kept.of(keep, images, stream, together)
    parts = [
        sampled(start) if kept is None else kept.part(start, count, sampled) for start in range(0, count, together)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Kept:
    """A folder of base paths: about.json says of what, and a file has the paths that are sampled together."""

    folder: Path
    together: int

    @classmethod
    def of(cls, folder: Path, images: Images, stream: int, together: int) -> Self:
        """The folder, made if there is none. Raises `UserError` if it is of other paths or cannot be written."""
        o, file = images.options, folder / "about.json"
        named = {name: getattr(o, name) for name in ("model", "reward", "prompts", "guidance", "num_steps", "seed")}
        about = {**named, "model files": hashes_of(o.model), "stream": stream, "together": together}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(file.read_text()) if file.exists() else None
            if found is None:
                write_json(file, about)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be used ({error}); choose another --bank") from None
        if found not in (None, about):
            other = [name for name in about if not isinstance(found, dict) or found.get(name) != about[name]]
            raise UserError(f"{folder} has base paths of another {' and '.join(other)}; choose another --bank")
        return cls(folder, together)

    def part(self, start: int, count: int, sampled: Callable[[int], Bank]) -> Bank:
        """The paths that are sampled together from number `start` on, if there are to be `count` in all."""
        file, size = self.folder / f"{start:07d}.npz", min(self.together, count - start)
        if file.exists():
            damaged = contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
            with damaged, file.open("rb") as content, np.load(content) as arrays:
                found = Bank(**{name: arrays[name][:size] for name in Bank._fields})
                if len(found.prompt_id) == size:
                    return found
        found = sampled(start)
        unfinished = file.with_suffix(".part")
        try:
            with unfinished.open("wb") as stream:
                np.savez(stream, **found._asdict())
            unfinished.replace(file)
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error}); make space, and the same command goes on") from None
        return found


def clean_of(chain: Chain, bank: Bank) -> Float[np.ndarray, "paths states elements"]:
    """x̂_# at every state; the sample is its own."""
    flat = bank.x.reshape(*bank.x.shape[:2], -1)
    found = flat.copy()
    on_x, on_output = (np.asarray(a)[:, None] for a in (chain.at.clean_x, chain.at.clean_o))
    found[:, :-1] = on_x * flat[:, :-1] + on_output * bank.base_output.reshape(len(flat), len(on_x), -1)
    return found


def fit_halves(
    fit: Fit, clean: Float[np.ndarray, "paths states elements"], bank: Bank, beta: float, num_prompts: int
) -> Memories:
    """V for each half of the bank, fitted to the other half."""
    seen = _seen(clean)

    def of(others: Bool[np.ndarray, " paths"]) -> ValueMemory:
        ends = Ends(Seen(*(a[others] for a in seen)), bank.log_reward[others], bank.prompt_id[others])
        return fit_value(fit, ends, beta, num_prompts)

    first = first_half(len(clean), num_prompts)
    return of(~first), of(first)


def values_of(
    fit: Fit,
    memories: Memories,
    clean: Float[np.ndarray, "paths states elements"],
    bank: Bank,
    beta: float,
    num_prompts: int,
) -> Values:
    """What V says of the bank's states, each half by the V that has not seen it."""
    seen = _seen(clean)
    found, by_clean = np.zeros(clean.shape[:2]), np.zeros((len(clean), clean.shape[1] - 1, clean.shape[2]), np.float32)
    first = first_half(len(clean), num_prompts)
    for memory, mine in zip(memories, (first, ~first), strict=True):
        asked = (Seen(*(a[mine] for a in seen)), bank.prompt_id[mine])
        found[mine] = fit.values(memory, *asked)
        by_clean[mine] = fit.gradients(memory, *asked)[0][:, :-1]
    log_w = beta * np.asarray(bank.log_reward, np.float64)
    for prompt in np.unique(bank.prompt_id):
        own = bank.prompt_id == prompt
        found[own, -1] = log_w[own] - np.logaddexp.reduce(log_w[own]) + np.log(own.sum())
    return Values(found, by_clean)


def _seen(clean: Float[np.ndarray, "paths states elements"]) -> Seen:
    return Seen(clean, np.zeros(clean.shape[:2], np.float32))


def first_half(count: int, num_prompts: int) -> Bool[np.ndarray, " paths"]:
    """Every prompt has paths in both halves."""
    first: Bool[np.ndarray, " paths"] = np.arange(count) // num_prompts % 2 == 0
    return first


def held_out_paths(
    images: Images,
    o: BankOptions,
    policy: Policy | None,
    chain: Chain,
    active: Bool[np.ndarray, " steps"] | None = None,
) -> tuple[certificate.Paths, UInt8[np.ndarray, "_n height width 3"]]:
    """Samples of a policy from the noise of the held-out base paths, some at a time, and the pictures of the first.

    Args:
        images: what is sampled.
        o: how many, and how many together.
        policy: a LoRA, or what is followed in its place; None for the base model.
        chain: the policy's steps.
        active: the steps with the policy; None: all.
    """

    @jax.jit
    def part(frozen: Params, policy: Any, keys: PRNGKeys, ids: PromptIds) -> Any:
        model, shape = images.model(frozen), images.base.latent_shape
        follow = following(model.predict, chain) if isinstance(policy, ValueGuide) else None
        found = sample_paths(model.predict, policy, chain, keys, shape, ids, active=active, predict_change=follow)
        fields = model.log_reward(found.latents, ids), found.spent, found.log_ratio, ids
        return images.base.decode(frozen["base"], found.latents), fields

    parts, shown = [], None
    for start in range(0, o.held_out, o.together):
        of_part = images.keys(HELD_OUT, start, min(o.together, o.held_out - start))
        pictures, fields = part(images.frozen, policy, *of_part)
        shown = levels(np.asarray(pictures[:SHOWN])) if shown is None else shown
        parts.append([np.asarray(field) for field in fields])
    assert shown is not None
    return certificate.Paths(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True))), shown


def certify(beta: float, whose: str, paths: certificate.Paths, base: certificate.Paths, file: Path) -> None:
    """Writes the certificate to `file`, and prints the main figures in a line."""
    judged = certificate.certify(paths, base, beta)
    file.write_text(json.dumps(asdict(judged), default=np.ndarray.tolist) + "\n")
    figures = {name: getattr(judged, name) for name in ("log_reward", "exponent", "needed", "spent", "efficiency")}
    if judged.at_beta:
        figures["gap"] = judged.at_beta.gap
    said = ", ".join(f"{name.replace('_', ' ')} {show(figure)}" for name, figure in figures.items())
    print(f"{whose}: {said}", flush=True)
