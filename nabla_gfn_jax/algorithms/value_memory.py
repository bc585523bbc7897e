"""The paths so far, as a learned log value sees them, and how it is learned from them; on the host.

V(x) = log E_#[R(x_T)^β | x] = log E_θ†[W | x], W = R(x_T)^β Π p_#/p_θ† over the steps after x. A state is seen as the
base model's clean sample x̂ in a few principal components, and, if asked for, as the guess g = log R(x̂), in units of
its standard deviation. V is a network (`value_network.py`).

The components of step k have one unit, the spread of what may still come: the root mean square of x_T − x̂ in its widest
component. V is the logarithm of a mean over what may still come, so it is smooth on this scale, nearly straight where a
path begins, and finer near its end. The units end at a quarter of the spread of x_T.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import numpy as np
from jaxtyping import Float, Int

from nabla_gfn_jax.algorithms import value_network
from nabla_gfn_jax.algorithms.value_network import Network, Points
from nabla_gfn_jax.options import Checked, option

Array: TypeAlias = np.ndarray[Any, Any]

_FINEST = 0.25  # of the spread of x_T: the smallest unit
_SMALLEST = 1e-6  # unit of x̂ for paths that are all the same; V does not depend on a guess that varies less
_SEED = 0  # of the network's first weights, of the draws and of the noise
_NEVER = -1  # the prompt of an empty place


class Seen(NamedTuple):
    """What V sees of the states of paths."""

    clean: Float[np.ndarray, "paths S elements"]  # x̂
    guess: Float[np.ndarray, "paths S"]  # log R(x̂), or 0 where V is not to see it


@flax.struct.dataclass
class ValueMemory:
    """Paths by place in a ring, and the network; S states of a path, d components."""

    seen: Int[np.ndarray, ""]  # paths so far
    prompt_id: Int[np.ndarray, " places"]
    components: Float[np.ndarray, "places S d"]  # of x̂
    ends: Float[np.ndarray, "places d"]  # of x_T
    guess: Float[np.ndarray, "places S"]
    log_w: Float[np.ndarray, "places S"]
    centre: Float[np.ndarray, " elements"]
    basis: Float[np.ndarray, "elements d"]
    middle: Float[np.ndarray, "S d"]  # the components' mean when V was last fitted
    unit: Float[np.ndarray, " S"]
    guess_middle: Float[np.ndarray, " S"]
    guess_unit: Float[np.ndarray, " S"]
    network: Network

    @classmethod
    def empty(cls, num_prompts: int) -> "ValueMemory":
        """Before the first path, whose shapes are not known yet."""
        none, table = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
        return cls(
            seen=np.zeros((), np.int64),
            prompt_id=np.zeros(0, np.int32),
            components=np.zeros((0, 0, 0), np.float32),
            ends=table,
            guess=table,
            log_w=table,
            centre=none,
            basis=table,
            middle=table,
            unit=none,
            guess_middle=none,
            guess_unit=none,
            network=Network.new(1, 0, num_prompts, _SEED),
        )


@dataclass(frozen=True, kw_only=True)
class FitOptions(Checked):
    """How V is fitted to the paths that a memory keeps."""

    components: int = option(64, "principal components of x̂ that V sees", minimum=1)
    width: int = option(256, "units of a layer of V's network", minimum=1)
    fit_updates: int = option(15, "updates of V's network whenever it is fitted", minimum=1)
    fit_batch: int = option(2048, "states in an update of V's network", minimum=1)
    fit_rate: float = option(1e-3, "learning rate of V's network", above=0)
    noise: float = option(0.2, "of V's inputs while it is fitted, in their units; more makes V smoother", minimum=0)
    weight_clip: float = option(20.0, "largest weight W/Z", above=0)
    weight_floor: float = option(0.01, "smallest weight W/Z, below which V does not fall", minimum=0)


@dataclass(frozen=True)
class Fit:
    """How a memory is kept and V is fitted."""

    options: FitOptions
    places: int  # of paths in the ring

    def add(
        self,
        memory: ValueMemory,
        states: Seen,
        samples: Float[np.ndarray, "paths elements"],
        log_w: Float[np.ndarray, "paths S"],
        prompt_id: Int[np.ndarray, " paths"],
    ) -> ValueMemory:
        """The memory with an epoch's paths; the oldest make room."""
        if not memory.basis.size:
            memory = self._begun(memory, states, samples)
        places = (memory.seen + np.arange(len(prompt_id))) % self.places
        places, new = places[-self.places :], slice(max(len(prompt_id) - self.places, 0), None)
        arrays = {
            "prompt_id": prompt_id,
            "components": self.project(memory, states.clean),
            "ends": self.project(memory, samples),
            "guess": states.guess,
            "log_w": log_w,
        }
        changed = {}
        for name, rows in arrays.items():
            changed[name] = getattr(memory, name).copy()
            changed[name][places] = rows[new]
        return memory.replace(seen=np.asarray(memory.seen + len(prompt_id)), **changed)  # type: ignore[attr-defined,no-any-return]

    def _begun(self, memory: ValueMemory, first: Seen, samples: Float[np.ndarray, "paths elements"]) -> ValueMemory:
        """The first paths say what the principal components are: those of their samples."""
        last = np.asarray(samples, np.float64)
        centre = last.mean(axis=0)
        size = min(self.options.components, last.shape[1])
        rows = np.linalg.svd(last - centre, full_matrices=False)[2][:size]
        basis = np.zeros((last.shape[1], size), np.float32)
        basis[:, : len(rows)] = rows.T
        states, num_prompts = first.clean.shape[1], len(memory.network.weights["prompts"])
        return ValueMemory(
            seen=memory.seen,
            prompt_id=np.full(self.places, _NEVER, np.int32),
            components=np.zeros((self.places, states, size), np.float32),
            ends=np.zeros((self.places, size), np.float32),
            guess=np.zeros((self.places, states), np.float32),
            log_w=np.zeros((self.places, states), np.float32),
            centre=centre.astype(np.float32),
            basis=basis,
            middle=np.zeros((states, size), np.float32),
            unit=np.ones(states, np.float32),
            guess_middle=np.zeros(states, np.float32),
            guess_unit=np.ones(states, np.float32),
            network=Network.new(size + 1, self.options.width, num_prompts, _SEED),
        )

    def project(
        self, memory: ValueMemory, clean: Float[np.ndarray, "*paths elements"]
    ) -> Float[np.ndarray, "*paths d"]:
        """The principal components of clean samples."""
        return (np.asarray(clean, np.float32) - memory.centre) @ memory.basis

    def fitted(self, memory: ValueMemory, log_z: Float[np.ndarray, " prompts"]) -> ValueMemory:
        """The memory with its units measured anew and some more updates of V's network. `log_z` is that of a prompt."""
        o, memory = self.options, _measured(memory)
        known = np.flatnonzero(memory.prompt_id != _NEVER)
        draw, network = np.random.default_rng((_SEED, int(memory.seen))), memory.network
        key = jax.random.fold_in(jax.random.key(_SEED), int(memory.seen))
        # A guess that is not used is always 0, and stays so.
        noise = np.full(memory.basis.shape[1] + 1, o.noise, np.float32)
        noise[-1] *= np.isfinite(memory.guess_unit).any()
        for update in range(o.fit_updates):
            path, state = draw.choice(known, o.fit_batch), draw.integers(len(memory.unit), size=o.fit_batch)
            log_ratio = memory.log_w[path, state] - log_z[memory.prompt_id[path]]
            ratio = np.clip(np.exp(log_ratio), o.weight_floor, o.weight_clip).astype(np.float32)
            points = _points(
                memory, memory.components[path, state], memory.guess[path, state], state, memory.prompt_id[path]
            )
            of_update = jax.random.fold_in(key, update)
            network = value_network.updated(network, points, ratio, noise, of_update, rate=o.fit_rate)
        return memory.replace(network=jax.tree.map(np.asarray, network))  # type: ignore[attr-defined,no-any-return]

    def values(
        self, memory: ValueMemory, states: Seen, prompt_id: Int[np.ndarray, " paths"]
    ) -> Float[np.ndarray, "paths S"]:
        """V − log Z at every state of the paths."""
        found = [value_network.values(memory.network, points) for points in self._asked(memory, states, prompt_id)]
        return np.stack([np.asarray(v) for v in found], axis=1)

    def gradients(
        self, memory: ValueMemory, states: Seen, prompt_id: Int[np.ndarray, " paths"]
    ) -> tuple[Float[np.ndarray, "paths S elements"], Float[np.ndarray, "paths S"]]:
        """∂V/∂x̂ with the guess held fixed, and ∂V/∂ log R(x̂), at every state of the paths."""
        by_clean, by_guess = np.zeros(states.clean.shape, np.float32), np.zeros(states.guess.shape, np.float32)
        for state, points in enumerate(self._asked(memory, states, prompt_id)):
            by_features = np.asarray(value_network.gradients(memory.network, points))
            by_clean[:, state] = by_features[:, :-1] @ memory.basis.T / memory.unit[state]
            by_guess[:, state] = by_features[:, -1] / memory.guess_unit[state]
        return by_clean, by_guess

    def _asked(self, memory: ValueMemory, states: Seen, prompt_id: Int[np.ndarray, " paths"]) -> list[Points]:
        """What the network sees at each state."""
        new = self.project(memory, states.clean)
        return [
            _points(memory, new[:, state], states.guess[:, state], np.full(len(new), state), prompt_id)
            for state in range(new.shape[1])
        ]


def _measured(memory: ValueMemory) -> ValueMemory:
    """The memory with the means and units of its paths."""
    known = memory.prompt_id != _NEVER
    components, ends, guess = memory.components[known], memory.ends[known], memory.guess[known]
    # One state at a time, so that there is no copy of all.
    rest = [np.sqrt(np.square(ends - components[:, state]).mean(axis=0).max()) for state in range(components.shape[1])]
    finest = max(_FINEST * float(ends.std(axis=0).max()), _SMALLEST)
    return memory.replace(  # type: ignore[attr-defined,no-any-return]
        middle=components.mean(axis=0),
        unit=np.maximum(rest, finest).astype(np.float32),
        guess_middle=guess.mean(axis=0),
        guess_unit=np.where((spread := guess.std(axis=0)) > _SMALLEST, spread, np.float32(np.inf)),
    )


def _points(
    memory: ValueMemory,
    components: Float[np.ndarray, "n d"],
    guess: Float[np.ndarray, " n"],
    state: Int[np.ndarray, " n"],
    prompt_id: Int[np.ndarray, " n"],
) -> Points:
    """States as the network sees them: their components, and last the guess."""
    a = (components - memory.middle[state]) / memory.unit[state, None]
    g = (guess - memory.guess_middle[state]) / memory.guess_unit[state]
    return Points(
        features=np.concatenate([a, g[:, None]], axis=1),
        time=(state / max(len(memory.unit) - 1, 1)).astype(np.float32),
        prompt_id=np.asarray(prompt_id, np.int32),
    )
