"""The log values of states, from where all paths so far have ended: a kernel regression, on the host, in NumPy.

V(x) = log E_#[R(x_T)^β | x] = log E_θ†[W | x], W = R(x_T)^β Π p_#/p_θ† over the steps after x. A state is seen as the
base model's clean sample x̂ in a few principal components, a, in units of the widest, and, if asked for, as the guess
g = log R(x̂), in units of its standard deviation. For every prompt and step

    V = log Z + b_0 + bᵀφ(a, g),     φ = ( √(2/F) cos(Ωa + ρ), a/3, g ),     Ω ~ N(0, 1/ℓ²)

with F random features of the Gaussian kernel of length ℓ (Rahimi & Recht 2007). b has the least

    Σ_paths ( V − log Z + (W/Z) e^{−(V−log Z)} ) + ridge ‖b‖²/2,

a gamma regression (McCullagh & Nelder 1989, chapter 8), which is convex. Its least is where e^V is the mean of W, and
only the ratio of W to its mean counts: states of low value, where the policy begins, are fitted as well as those of
high value. The ridge keeps V flat as long as there are few paths.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import numpy as np
import scipy.optimize
from jaxtyping import Float, Int

from nabla_gfn_jax.options import Checked, option

Array: TypeAlias = np.ndarray[Any, Any]

_LINEAR = 1 / 3  # a's own weight among the features
_LOWEST = -6.0  # V − log Z below which e^{−(V−log Z)} goes on as a parabola, so that no trial step overflows
_ITERATIONS = 40  # of L-BFGS, from the solution of the epoch before
_SEED = 0  # of the random features
_NEVER = -1  # the prompt of an empty place


class Seen(NamedTuple):
    """What V sees of the states of paths."""

    clean: Float[np.ndarray, "paths S elements"]  # x̂
    guess: Float[np.ndarray, "paths S"]  # log R(x̂), or 0 where V is not to see it


@flax.struct.dataclass
class ValueMemory:
    """Paths by place in a ring, and what was fitted to them; S states of a path, d components, F features."""

    seen: Int[np.ndarray, ""]  # paths so far
    prompt_id: Int[np.ndarray, " places"]
    components: Float[np.ndarray, "places S d"]
    guess: Float[np.ndarray, "places S"]
    log_w: Float[np.ndarray, "places S"]
    centre: Float[np.ndarray, " elements"]
    basis: Float[np.ndarray, "elements d"]
    solution: Float[np.ndarray, "prompts S F"]

    @classmethod
    def empty(cls, num_prompts: int) -> "ValueMemory":
        """Before the first path, whose shapes are not known yet."""
        return cls(
            seen=np.zeros((), np.int64),
            prompt_id=np.zeros(0, np.int32),
            components=np.zeros((0, 0, 0), np.float32),
            guess=np.zeros((0, 0), np.float32),
            log_w=np.zeros((0, 0), np.float32),
            centre=np.zeros(0, np.float32),
            basis=np.zeros((0, 0), np.float32),
            solution=np.zeros((num_prompts, 0, 0), np.float32),
        )


@dataclass(frozen=True, kw_only=True)
class FitOptions(Checked):
    """How V is fitted to the paths that a memory keeps."""

    components: int = option(32, "principal components of x̂ that V sees", minimum=1)
    features: int = option(600, "random features of the kernel", minimum=1)
    length: float = option(1.5, "the kernel's length, in standard deviations of the first component", above=0)
    ridge: float = option(2.0, "of V's fit: how many paths' worth of doubt there is about each feature", above=0)
    weight_clip: float = option(20.0, "largest weight W/Z", above=0)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a memory is kept and fitted."""

    places: int  # of paths in the ring
    components: int  # d, at most
    features: int  # of the kernel
    length: float  # ℓ
    ridge: float
    weight_clip: float  # largest W/Z

    @classmethod
    def of(cls, options: FitOptions, places: int) -> "Fit":
        """The fit that the options ask for."""
        return cls(places=places, **{field.name: getattr(options, field.name) for field in fields(FitOptions)})

    def add(
        self,
        memory: ValueMemory,
        states: Seen,
        log_w: Float[np.ndarray, "paths S"],
        prompt_id: Int[np.ndarray, " paths"],
    ) -> ValueMemory:
        """The memory with an epoch's paths; the oldest make room."""
        if not memory.basis.size:
            memory = self._begun(memory, states.clean)
        places = (memory.seen + np.arange(len(prompt_id))) % self.places
        places, new = places[-self.places :], slice(max(len(prompt_id) - self.places, 0), None)
        components = self.project(memory, states.clean)
        arrays = {"prompt_id": prompt_id, "components": components, "guess": states.guess, "log_w": log_w}
        changed = {}
        for name, rows in arrays.items():
            changed[name] = getattr(memory, name).copy()
            changed[name][places] = rows[new]
        return memory.replace(seen=np.asarray(memory.seen + len(prompt_id)), **changed)  # type: ignore[attr-defined,no-any-return]

    def _begun(self, memory: ValueMemory, clean: Float[np.ndarray, "paths S elements"]) -> ValueMemory:
        """The first paths say what the principal components are: those of their last states."""
        last = np.asarray(clean[:, -1], np.float64)
        centre = last.mean(axis=0)
        size = min(self.components, last.shape[1])
        rows = np.linalg.svd(last - centre, full_matrices=False)[2][:size]
        basis = np.zeros((last.shape[1], size), np.float32)
        basis[:, : len(rows)] = rows.T
        states = clean.shape[1]
        return ValueMemory(
            seen=memory.seen,
            prompt_id=np.full(self.places, _NEVER, np.int32),
            components=np.zeros((self.places, states, size), np.float32),
            guess=np.zeros((self.places, states), np.float32),
            log_w=np.zeros((self.places, states), np.float32),
            centre=centre.astype(np.float32),
            basis=basis,
            solution=np.zeros((len(memory.solution), states, 1 + self.features + size + 1), np.float32),
        )

    def project(
        self, memory: ValueMemory, clean: Float[np.ndarray, "paths S elements"]
    ) -> Float[np.ndarray, "paths S d"]:
        """The principal components of clean samples."""
        return (np.asarray(clean, np.float32) - memory.centre) @ memory.basis

    def fitted(
        self, memory: ValueMemory, prompts: Int[np.ndarray, " some"], log_z: Float[np.ndarray, " prompts"]
    ) -> ValueMemory:
        """The memory with V fitted for these prompts, at every state. `log_z` is that of all prompts."""
        solution = memory.solution.copy()
        waves = self._waves(memory.basis.shape[1])
        for prompt in prompts:
            known = memory.prompt_id == prompt
            w = np.minimum(np.exp(memory.log_w[known] - log_z[prompt]), self.weight_clip)
            for state in range(w.shape[1]):
                a, g = memory.components[known, state], memory.guess[known, state, None]
                phi = features(_scaled(a, a)[0], _scaled(g, g)[0], *waves)
                solution[prompt, state] = self._solve(phi, w[:, state], solution[prompt, state])
        return memory.replace(solution=solution)  # type: ignore[attr-defined,no-any-return]

    def values(
        self, memory: ValueMemory, states: Seen, prompt_id: Int[np.ndarray, " paths"]
    ) -> Float[np.ndarray, "paths S"]:
        """V − log Z at every state of the paths."""
        found, waves = np.zeros(states.guess.shape, np.float32), self._waves(memory.basis.shape[1])
        for asked, state, (a, _), (g, _), b in self._asked(memory, states, prompt_id):
            found[asked, state] = features(a, g, *waves) @ b
        return found

    def gradients(
        self, memory: ValueMemory, states: Seen, prompt_id: Int[np.ndarray, " paths"]
    ) -> tuple[Float[np.ndarray, "paths S elements"], Float[np.ndarray, "paths S"]]:
        """∂V/∂x̂ with the guess held fixed, and ∂V/∂ log R(x̂), at every state of the paths."""
        by_clean, by_guess = np.zeros(states.clean.shape, np.float32), np.zeros(states.guess.shape, np.float32)
        waves = self._waves(memory.basis.shape[1])
        for asked, state, (a, unit), (_, of_guess), b in self._asked(memory, states, prompt_id):
            by_clean[asked, state] = slope(a, b, *waves) @ memory.basis.T / unit
            by_guess[asked, state] = b[-1] / of_guess
        return by_clean, by_guess

    def _asked(
        self, memory: ValueMemory, states: Seen, prompt_id: Int[np.ndarray, " paths"]
    ) -> Iterator[tuple[Array, int, tuple[Array, float], tuple[Array, float], Array]]:
        """For each prompt and state: the paths that ask, the state, their a and g, each with its unit, and b."""
        new = self.project(memory, states.clean)
        for prompt in np.unique(prompt_id):
            known, asked = memory.prompt_id == prompt, prompt_id == prompt
            for state in range(new.shape[1]):
                a = _scaled(new[asked, state], memory.components[known, state])
                g = _scaled(states.guess[asked, state, None], memory.guess[known, state, None])
                yield asked, state, a, g, memory.solution[prompt, state]

    def _waves(self, size: int) -> tuple[Float[np.ndarray, "d F"], Float[np.ndarray, " F"]]:
        random = np.random.default_rng(_SEED)
        omega = random.normal(size=(size, self.features)) / self.length
        return omega.astype(np.float32), random.uniform(0, 2 * np.pi, self.features).astype(np.float32)

    def _solve(
        self, phi: Float[np.ndarray, "paths F"], w: Float[np.ndarray, " paths"], start: Float[np.ndarray, " F"]
    ) -> Float[np.ndarray, " F"]:
        """b of the least loss."""
        penalty = np.r_[0.0, np.full(phi.shape[1] - 1, self.ridge)]

        def loss(b: Float[np.ndarray, " F"]) -> tuple[float, Float[np.ndarray, " F"]]:
            v = phi @ b.astype(np.float32)
            under = np.minimum(v - np.float32(_LOWEST), 0)
            ratio = w * np.exp(-np.maximum(v, _LOWEST))
            value = (v + ratio * (1 - under + under**2 / 2)).sum(dtype=np.float64) + penalty @ b**2 / 2
            return float(value), (phi.T @ (1 - ratio * (1 - under))).astype(np.float64) + penalty * b

        options = {"maxiter": _ITERATIONS}
        result = scipy.optimize.minimize(loss, start.astype(np.float64), jac=True, method="L-BFGS-B", options=options)
        return np.asarray(result.x, np.float32)


def _scaled(
    new: Float[np.ndarray, "paths d"], known: Float[np.ndarray, "others d"]
) -> tuple[Float[np.ndarray, "paths d"], float]:
    """a, and the unit of its components: the standard deviation of the widest, over the known paths."""
    unit = max(float(known.std(axis=0).max()), 1e-6)
    return (new - known.mean(axis=0)) / unit, unit


def features(
    a: Float[np.ndarray, "paths d"],
    g: Float[np.ndarray, "paths 1"],
    omega: Float[np.ndarray, "d waves"],
    phase: Float[np.ndarray, " waves"],
) -> Float[np.ndarray, "paths F"]:
    """1, the cosines, a itself, and g."""
    waves = np.sqrt(np.float32(2 / max(len(phase), 1))) * np.cos(a @ omega + phase)
    return np.concatenate([np.ones((len(a), 1), np.float32), waves, np.float32(_LINEAR) * a, g], axis=1)


def slope(
    a: Float[np.ndarray, "paths d"],
    b: Float[np.ndarray, " F"],
    omega: Float[np.ndarray, "d waves"],
    phase: Float[np.ndarray, " waves"],
) -> Float[np.ndarray, "paths d"]:
    """∂/∂a of bᵀφ(a, g)."""
    cosines, own = b[1 : 1 + len(phase)], b[1 + len(phase) : -1]
    waves = -np.sqrt(np.float32(2 / max(len(phase), 1))) * np.sin(a @ omega + phase) * cosines
    return waves @ omega.T + np.float32(_LINEAR) * own
