"""An update of the emoji config with the paper's loss, as the released program makes it and as this one does."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.emoji import Ours, Theirs
from benchmarks.timing import compare
from nabla_gfn_jax.diffusion.schedule import alphas_cumprod


def run() -> Iterator[tuple[str, str, str, str]]:
    """All 32 trajectories' 192 transitions, two micro-batches, one AdamW step."""
    ours = Ours()
    theirs = Theirs(ours)
    data, weight = ours.data(), np.ones(len(ours.keys), np.float32)
    program = TorchUpdate(theirs, ours, jax.tree.map(np.asarray, data))
    state = ours.state

    def update() -> dict[str, Any]:
        nonlocal state
        state = jax.tree.map(np.asarray, state)
        state, metrics = jax.block_until_ready(ours.trainer.update(ours.trainer.frozen, state, data, weight))
        return metrics

    want, got = program.step(apply=False), update()
    for name in ("loss", "grad_norm_lora", "grad_norm_correction"):
        error = abs(want[name] - float(got[name])) / abs(want[name])
        assert error < 1e-3, f"{name}: {want[name]} in PyTorch, {float(got[name])} here"
    yield compare("(a) update of configs/emoji.py, lookahead, 32 trajectories", program.step, update, rounds=5)


class TorchUpdate:
    """Reference, policy and next pass for every transition, a pull-back for every gradient, one after another."""

    def __init__(self, model: Theirs, ours: Ours, transitions: Any) -> None:
        self.model, self.config = model, ours.config
        self.alpha_bars = torch.tensor(np.float32(alphas_cumprod(ours.trainer.base.scheduler)))
        decay = self.config.training
        self.optimizer = torch.optim.AdamW(
            [
                {"params": model.lora, "weight_decay": decay.weight_decay_lora},
                {"params": list(model.flow.parameters()), "weight_decay": decay.weight_decay_correction},
            ],
            lr=decay.learning_rate,
        )
        parts = self.config.training.micro_batches
        devices = ours.trainer.mesh.size
        # Micro-batches as the devices make them: the mean does not depend on it.
        self.parts = [_part(ours, transitions, i, parts * devices) for i in range(parts * devices)]
        self.parts = [{k: torch.cat([p[k] for p in self.parts[i::parts]]) for k in self.parts[0]} for i in range(parts)]

    def step(self, apply: bool = True) -> dict[str, float]:
        self.optimizer.zero_grad()
        loss = 0.0
        for part in self.parts:
            value = self._loss(part) / len(self.parts)
            value.backward()
            loss += value.item()
        clip = self.config.training.clip
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], clip).item() for group in self.optimizer.param_groups]
        if apply:
            self.optimizer.step()
        return {"loss": loss, "grad_norm_lora": norms[0], "grad_norm_correction": norms[1]}

    def _loss(self, c: dict[str, torch.Tensor]) -> torch.Tensor:
        algorithm, last = self.config.algorithm, c["t_next"] == 0
        x, y = c["x"].requires_grad_(), c["y"].requires_grad_()
        sigma, a, a_next = (c[name][:, None, None, None] for name in ("sigma", "a", "a_next"))

        def mean(eps: torch.Tensor) -> torch.Tensor:
            return a_next.sqrt() * clean(eps, x, a) + (1 - a_next - sigma**2).sqrt() * eps

        def clean(eps: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return (x - (1 - a).sqrt() * eps) / a.sqrt()

        def pull(value: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(value.sum(), at, retain_graph=True)[0].detach()

        def log_p(eps: torch.Tensor) -> torch.Tensor:
            return -((c["y"].detach() - mean(eps)) ** 2 / (2 * sigma**2))

        eps = self._predict(x, c["t"], c)
        reverse = pull(log_p(eps), x)
        guess_x = algorithm.beta * pull(c["a"] * self.model.log_reward(clean(eps, x, a)), x)
        self.model.pipe.unet.disable_adapters()
        base = self._predict(x, c["t"], c)
        base_reverse = pull(log_p(base), x)
        self.model.pipe.unet.enable_adapters()
        eps_y = self._predict(y, c["t_next"], c)
        clean_y = torch.where(last[:, None, None, None], y, clean(eps_y, y, a_next))
        guess_y = algorithm.beta * pull(c["a_next"] * self.model.log_reward(clean_y), y)

        flow_x, flow_y = (
            self.model.flow(z.detach(), t, c["context"]).sample for z, t in ((x, c["t"]), (y, c["t_next"]))
        )
        change = (mean(eps) - mean(base)).detach() + (mean(eps) - mean(eps).detach())
        weight = c["sigma"] ** 2 if algorithm.variance_weighted else 1.0
        credit = guess_y + torch.where(last[:, None, None, None], 0.0, flow_y)
        forward = weight * _mean_square(change / sigma**2 - credit)
        backward = _mean_square(reverse - base_reverse + guess_x + flow_x)
        terminal = _mean_square(flow_y)
        return (forward + torch.where(last, terminal, backward)).mean()

    def _predict(self, x: torch.Tensor, t: torch.Tensor, c: dict[str, torch.Tensor]) -> torch.Tensor:
        """ε, guided, of a v-prediction model."""
        context = torch.cat([c["negative"], c["context"]])
        v, with_prompt = self.model.pipe.unet(torch.cat([x, x]), torch.cat([t, t]), context).sample.chunk(2)
        v = v + self.config.sampling.guidance * (with_prompt - v)
        a = self.alpha_bars[t][:, None, None, None]
        return a.sqrt() * v + (1 - a).sqrt() * x


def _mean_square(a: torch.Tensor) -> torch.Tensor:
    return (a**2).flatten(1).mean(1)


def _part(ours: Ours, transitions: Any, i: int, parts: int) -> dict[str, torch.Tensor]:
    """One of the parts of an epoch's trajectories: its ordinary transitions and its last ones, in a row."""

    def rows(of: Any) -> dict[str, np.ndarray]:
        image = lambda z: np.moveaxis(z, -1, -3)  # noqa: E731
        step, table = jax.tree.map(np.asarray, ours.trainer.chain[of.index]), ours.trainer.table["base"]
        context = np.asarray(table.context)[of.prompt_id]
        found = {"x": image(of.x), "y": image(of.y), "t": step.at.time, "t_next": step.to.time}
        found |= {"a": step.at.signal, "a_next": step.to.signal, "sigma": step.sigma}
        return found | {"context": context, "negative": np.broadcast_to(table.empty, context.shape)}

    ordinary, last = rows(transitions.ordinary), rows(transitions.last)
    joined = {}
    for name in ordinary:
        a, b = ordinary[name][0], last[name][0]  # the epoch's one draw
        size = len(b) // parts
        a, b = a[i * size : (i + 1) * size], b[i * size : (i + 1) * size]
        together = np.concatenate([a.reshape(-1, *a.shape[2:]), b])
        joined[name] = torch.tensor(together.astype(np.int64 if together.dtype == np.int32 else together.dtype))
    return joined
