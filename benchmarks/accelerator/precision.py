"""Measures the error of the loss and its gradient in bfloat16, one transition at a time, with a LoRA that is not zero.

The forward term multiplies the difference of two outputs by a number that grows to 83 at the last step. The error of
the difference is therefore measured relative to the difference, both for subtracted outputs and for a change that is
carried through the network. The reference is our float32 with products in full float32. The same transitions in PyTorch
show whether both programs compute the same, and the error of PyTorch in bfloat16.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.flatten_util import ravel_pytree

from benchmarks.accelerator.parity import compile_quickly, relative
from benchmarks.accelerator.sizes import Size, Weights, as_dtype
from benchmarks.accelerator.worker import Worker
from nabla_gfn_jax.algorithms.transitions import Transition
from nabla_gfn_jax.diffusion.chain import Chain, Level

_DTYPES = ("float32", "bfloat16")
_CHANGES = (0.001, 0.01, 0.1)  # ‖ε_θ − ε_#‖ / ‖ε_#‖ of a LoRA in the middle of the path


def run(worker: Worker, stage: str) -> None:
    """Compiles for both types simultaneously, then compares."""
    study = Study(worker)
    worker.wait("ready")
    study.place()
    scales = study.scales()
    for change, scale in zip(_CHANGES, scales, strict=True):
        worker.attempt(f"score's change, LoRA of {change:g}", lambda c=change, s=scale: study.score_changes(c, s))
    for change, scale in zip(_CHANGES[1:], scales[1:], strict=True):
        transitions = {(d, k): study.transition(d, scale, k) for d in _DTYPES for k in study.steps}
        what = f"LoRA of {change:g}"
        losses = worker.attempt(what, lambda t=transitions, s=scale, w=what: study.losses(w, s, t))
    if losses:
        worker.attempt("loss in PyTorch", lambda: study.in_torch(scales[-1], transitions, losses))


@dataclass
class Loss:
    """The loss of one transition: its terms, and the gradient of each group of parameters as one vector."""

    terms: dict[str, float]
    lora: np.ndarray
    correction: np.ndarray


class Study:
    """The programs for both types, and their arguments."""

    def __init__(self, worker: Worker):
        self.worker, self.size, self.weights = worker, Size(worker.small), Weights()
        self.configs = {dtype: self.size.config(model_dtype=dtype, training__trajectories=1) for dtype in _DTYPES}
        self.pieces = {dtype: self.size.pieces(config) for dtype, config in self.configs.items()}
        pieces = self.pieces["float32"]
        self.frozen = self.weights.frozen(pieces.frozen_params)
        shapes = jax.eval_shape(lambda: pieces.first_state(0, self.configs["float32"].lora.rank)).params
        self.params = self.weights.like(shapes)
        self.chain = pieces.chain
        last = self.chain.num_steps - 1
        self.steps = (0, last // 2, last) if worker.small else (0, 10, 20, 30, 40, 45, 48, last)
        self.prompt_id = np.zeros(1, np.int32)
        self.clean, self.noise, self.more = (self.weights.normal((1, *pieces.base.latent_shape)) for _ in range(3))
        example = self._transition(0, self.clean, self.clean)
        with ThreadPoolExecutor() as pool:
            jobs = [(dtype, kind) for dtype in _DTYPES for kind in ("eps", "ordinary", "last")]
            built = pool.map(lambda job: self._build(*job, example), jobs)
            self.programs = dict(zip(jobs, built, strict=True))

    def _build(self, dtype: str, kind: str, example: Transition) -> Any:
        pieces = self.pieces[dtype]

        def eps(frozen: Any, params: Any, x: Any, level: Level) -> Any:
            model = replace(pieces, carry_change=True).model(frozen)
            policy, base = (model.predict(lora, x, level, self.prompt_id) for lora in (params["lora"], None))
            if model.predict_change is None:
                return policy, base, policy - base
            return policy, base, model.predict_change(params["lora"], x, level, self.prompt_id)[1]

        def loss(frozen: Any, params: Any, transition: Transition) -> Any:
            return getattr(pieces.algorithm, kind)(params, pieces.model(frozen), transition)

        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (self._cast(dtype), self.params))
        function: Callable[..., Any] = eps if kind == "eps" else loss
        more = (self.clean, self._step(0).at) if kind == "eps" else (example,)
        compiled = self.worker.attempt(
            f"{kind} in {dtype}",
            lambda: compile_quickly(function, "highest" if dtype == "float32" else None, *shapes, *more),
        )
        return compiled

    def _cast(self, dtype: str) -> Any:
        table = {**self.frozen["table"], "base": as_dtype(self.frozen["table"]["base"], dtype)}
        return {**self.frozen, "base": as_dtype(self.frozen["base"], dtype), "table": table}

    def place(self) -> None:
        """Moves the weights to the device."""
        self.on_device = {dtype: jax.device_put(self._cast(dtype)) for dtype in _DTYPES}

    def _x(self, k: int) -> np.ndarray:
        """A state at step k."""
        signal = float(self.chain.at.signal[k])
        return np.asarray(signal**0.5 * self.clean + (1 - signal) ** 0.5 * self.noise, np.float32)

    def eps(self, dtype: str, scale: float, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ε_θ, ε_# and their difference as computed in the losses, at step k."""
        found = self.programs[dtype, "eps"](self.on_device[dtype], self.at(scale), self._x(k), self._step(k).at)
        return tuple(np.asarray(a) for a in found)  # type: ignore[return-value]

    def at(self, scale: float) -> Any:
        """The parameters with the LoRA multiplied by `scale`."""
        flat = flatten_dict(self.params["lora"])
        lora = {path: leaf * (scale if path[-1] == "up" else 1.0) for path, leaf in flat.items()}
        as_float32 = jax.tree.map(lambda a: np.asarray(a, np.float32), unflatten_dict(lora))
        return {**self.params, "lora": as_float32}

    def scales(self) -> list[float]:
        """The LoRA's scale for each of `_CHANGES`, assuming that the change is proportional to the scale."""
        middle, found = self.steps[len(self.steps) // 2], []
        scale = 0.01
        for change in _CHANGES:
            for _ in range(3):
                policy, base, _ = self.eps("float32", scale, middle)
                scale *= change / max(relative(policy, base), 1e-9)
            found.append(scale)
        return found

    def _step(self, k: int) -> Chain:
        return self.chain[np.asarray([k])]

    def score_changes(self, change: float, scale: float) -> None:
        """Compares s_θ − s_# in bfloat16 with float32, at the step where it is largest and at others."""
        errors: dict[str, dict[str, float]] = {"subtracted": {}, "carried through the network": {}}
        for k in self.steps:
            (*_, truth), (policy, base, carried) = (self.eps(dtype, scale, k) for dtype in _DTYPES)
            for way, found in zip(errors, (policy - base, carried), strict=True):
                errors[way][f"step_{k}"] = relative(found, truth)
        noise = relative(base, self.eps("float32", scale, k)[1])
        for way, by_step in errors.items():
            self.worker.row(
                f"relative error of s_θ − s_# in bfloat16, {way}, LoRA that changes ε by {change:g}",
                note=f"ε itself: {noise:.1e}",
                **by_step,
            )

    def _transition(self, k: int, eps: np.ndarray, recorded: np.ndarray) -> Transition:
        x, step = self._x(k), self._step(k)
        y = np.asarray(step.mean(jnp.asarray(eps), jnp.asarray(x))) + float(step.sigma[0]) * self.more
        return Transition(
            x=x, y=y, output=recorded, index=np.full(1, k, np.int32), prompt_id=self.prompt_id, adjoint=None
        )

    def transition(self, dtype: str, scale: float, k: int) -> Transition:
        """A transition x → y at step k that the policy samples in float32, with ε_θ† of a weaker LoRA in `dtype`."""
        return self._transition(k, self.eps("float32", scale, k)[0], self.eps(dtype, 0.9 * scale, k)[0])

    def losses(self, what: str, scale: float, transitions: dict[tuple[str, int], Transition]) -> Any:
        """The losses by type and step, compared for each step and over all steps."""
        params, found = self.at(scale), {}
        for (dtype, k), transition in transitions.items():
            program = self.programs[dtype, "last" if k == self.steps[-1] else "ordinary"]
            terms, gradient = program(self.on_device[dtype], params, transition)
            vectors = (np.asarray(ravel_pytree(gradient[group])[0], np.float64) for group in ("lora", "correction"))
            found[dtype, k] = Loss({name: float(value) for name, value in terms.items()}, *vectors)
        for k in self.steps:
            self._compare(f"{what}, step {k}", *([found[dtype, k]] for dtype in _DTYPES))
        for which, steps in (("all but the last", self.steps[:-1]), ("all", self.steps)):
            sides = ([found[dtype, k] for k in steps] for dtype in _DTYPES)
            self._compare(f"{what}, {which} of these steps as one update", *sides)
        return found

    def _compare(self, what: str, exact: list[Loss], rounded: list[Loss]) -> None:
        numbers: dict[str, Any] = {}
        for name in exact[0].terms:
            truth = sum(loss.terms[name] for loss in exact)
            if truth:
                error = sum(loss.terms[name] for loss in rounded) - truth
                numbers |= {f"{name}": truth, f"its_relative_error_{name.removeprefix('loss_')}": error / truth}
        for group in ("lora", "correction"):
            a, b = (sum(getattr(loss, group) for loss in side) for side in (rounded, exact))
            norm = np.linalg.norm(a) * np.linalg.norm(b)
            if norm:
                numbers[f"gradient_error_{group}"] = relative(a, b)
                numbers[f"cosine_{group}"] = float(a @ b / norm)
        self.worker.row(f"bfloat16 against float32, {what}", **numbers)

    def in_torch(self, scale: float, transitions: dict[tuple[str, int], Transition], losses: Any) -> None:
        """Compares the released program's loss of the same transitions, in float32 and bfloat16, with our float32."""
        import torch

        from benchmarks.accelerator.torch_networks import Program, batch_of, use_tf32
        from benchmarks.naive_loss import loss_terms

        use_tf32(False)
        config, params = self.configs["float32"], self.at(scale)
        del self.on_device
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            program = Program(self.size, config, self.frozen, params, dtype)
            for k in self.steps:
                for parameter in program.trained:
                    parameter.grad = None
                terms = loss_terms(
                    program.networks,
                    config.algorithm,
                    batch_of(transitions[name, k], self.chain, self.frozen["table"], 1),
                )
                torch.stack(list(terms.values())).sum().backward()
                ours = losses["float32", k]
                errors = {
                    f"relative_error_{n.removeprefix('loss_')}": (float(value.detach()) - ours.terms[n]) / ours.terms[n]
                    for n, value in terms.items()
                    if ours.terms[n]
                }
                norm = float(torch.stack([p.grad.norm() for p in program.trained]).norm())
                errors["gradient_norm_lora"] = norm / float(np.linalg.norm(ours.lora)) - 1
                self.worker.row(f"PyTorch in {name} against our float32, step {k}", **errors)
            del program
