"""Compares an update of the emoji config with the paper's loss in this package and as in the released program."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.emoji import Ours, Theirs
from benchmarks.naive_loss import Batch, Networks, batch_of, loss_terms
from benchmarks.timing import compare
from nabla_gfn_jax.algorithms.transitions import flatten
from nabla_gfn_jax.diffusion.schedule import alphas_cumprod


def run() -> Iterator[tuple[str, str, str, str]]:
    """Times an update: 192 transitions of 32 trajectories, two micro-batches, one AdamW step."""
    ours = Ours()
    theirs = Theirs(ours)
    data, weight = ours.data(), np.ones(len(ours.keys), np.float32)
    program = TorchUpdate(theirs, ours, jax.tree.map(np.asarray, data))
    state = ours.state

    def update() -> dict[str, Any]:
        nonlocal state
        state = jax.tree.map(np.asarray, state)
        state, steps = jax.block_until_ready(ours.trainer.update(ours.trainer.frozen, state, data, weight))
        return {name: values.mean() for name, values in steps.metrics.items()}

    want, got = program.step(apply=False), update()
    for name in ("loss", "grad_norm_lora", "grad_norm_correction"):
        error = abs(want[name] - float(got[name])) / abs(want[name])
        assert error < 1e-3, f"{name}: {want[name]} in PyTorch, {float(got[name])} here"
    yield compare("(a) update of configs/emoji.py, lookahead, 32 trajectories", program.step, update, rounds=5)


class TorchUpdate:
    """The update in PyTorch: separate passes for base model, policy and y of each transition, and for each gradient."""

    def __init__(self, model: Theirs, ours: Ours, transitions: Any) -> None:
        self.model, self.config = model, ours.config
        self.alpha_bars = torch.tensor(np.float32(alphas_cumprod(ours.trainer.base.scheduler)))
        decay = self.config.training
        self.optimizer = torch.optim.AdamW(
            [
                {"params": model.lora, "weight_decay": decay.weight_decay_lora},
                {"params": list(model.correction.parameters()), "weight_decay": decay.weight_decay_correction},
            ],
            lr=decay.learning_rate,
        )
        parts = self.config.training.micro_batches
        devices = ours.trainer.mesh.size
        # The same micro-batches as on the devices; the mean does not depend on them.
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

    def _loss(self, c: Batch) -> torch.Tensor:
        networks = Networks(
            self._predict,
            lambda z, c: self.model.log_reward(z),
            lambda x, t, c: self.model.correction(x, t, c["context"]).sample,
        )
        return sum(loss_terms(networks, self.config.algorithm, c).values()).mean()

    def _predict(self, x: torch.Tensor, t: torch.Tensor, c: Batch, base: bool) -> torch.Tensor:
        """The guided ε of a v-prediction model."""
        context = torch.cat([c["negative"], c["context"]])
        (self.model.pipe.unet.disable_adapters if base else self.model.pipe.unet.enable_adapters)()
        v, with_prompt = self.model.pipe.unet(torch.cat([x, x]), torch.cat([t, t]), context).sample.chunk(2)
        v = v + self.config.sampling.guidance * (with_prompt - v)
        a = self.alpha_bars[t][:, None, None, None]
        return a.sqrt() * v + (1 - a).sqrt() * x


def _part(ours: Ours, transitions: Any, i: int, parts: int) -> Batch:
    """Part `i` of an epoch's trajectories: its ordinary transitions followed by its last ones."""
    ordinary, last = jax.tree.map(lambda a: a[0], (transitions.ordinary, transitions.last))  # the epoch's one draw
    size = len(last.x) // parts
    ordinary, last = jax.tree.map(lambda a: a[i * size : (i + 1) * size], (ordinary, last))
    whole = jax.tree.map(lambda a, b: np.concatenate([a, b]), flatten(ordinary), last)
    return batch_of(whole, ours.trainer.chain, ours.trainer.table["base"])
