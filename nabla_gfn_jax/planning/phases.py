"""Compiles the functions of a run for devices that are not attached, and derives memory and time."""

import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nabla_gfn_jax.base_models.names import DTYPES, abstract_model
from nabla_gfn_jax.flops import FULL, count_flops
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, placed
from nabla_gfn_jax.planning.chips import Chip
from nabla_gfn_jax.planning.hlo import Traffic, traffic
from nabla_gfn_jax.rewards import ABSTRACT, load_reward
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import assemble, prompts_of
from nabla_gfn_jax.training.prompts import abstract_table, table_rows
from nabla_gfn_jax.training.trainer import BY_UPDATE, Trainer

_PROMPTS = 1500  # the size of the largest prompt set of the paper, HPDv2's photos and paintings
PHASES = ("rollout", "update")


@dataclass(frozen=True)
class Phase:
    """A compiled function of the run on one device. Sizes are in bytes."""

    name: str
    arguments: int
    temporaries: int
    results: int  # without results that are written over arguments
    flops: dict[str, float]  # by the operands' type
    traffic: Traffic
    compile_seconds: float

    @property
    def peak(self) -> int:
        """Arguments, temporaries and results together."""
        return self.arguments + self.temporaries + self.results


class Plan:
    """The functions of a run, compiled for the devices of `mesh`."""

    def __init__(self, config: Settings, chip: Chip, mesh: Mesh, full_effort: bool):
        self.config, self.chip, self.mesh, self.full_effort = config, chip, mesh, full_effort
        self.trainer: Trainer = abstract_trainer(config, mesh)

    def compile(self, name: str, trainer: Trainer | None = None) -> Phase | str:
        """The compiled phase, or the compiler's message if the phase needs more memory than the device has."""
        trainer = trainer or self.trainer
        function, arguments = self.phase(name, trainer)
        mine = self.config.training.trajectories // self.mesh.size
        print(f"compiling {name}, micro-batches of {mine // trainer.micro_batches} per device", file=sys.stderr)
        start = time.time()
        try:
            compiled = function.lower(*arguments).compile(compiler_options=self._compiler_options())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return next((line.strip() for line in str(error).splitlines() if "exceed" in line), "too big")
        memory = compiled.memory_analysis()
        return Phase(
            name=name,
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            flops=count_flops(function, *arguments),
            traffic=traffic(compiled.as_text()),
            compile_seconds=time.time() - start,
        )

    def least_seconds(self, phase: Phase) -> float:
        """The time of the phase's FLOPs at the chip's peak rates, a lower bound."""
        rounded = sum(flops for kind, flops in phase.flops.items() if kind != FULL)
        return rounded / self.chip.flops + phase.flops.get(FULL, 0.0) / self.chip.float32_flops

    def estimated_seconds(self, phase: Phase) -> float | None:
        """The time by the compiler's cost model; None without `full_effort` or if the chip's clock is unknown."""
        if not (self.full_effort and self.chip.clock and phase.traffic.cycles):
            return None
        return phase.traffic.cycles / self.chip.clock

    def fits(self, phase: Phase | str) -> bool:
        """Whether the chip has enough memory.

        The check is needed because compilers for GPUs do not refuse a program.
        """
        return isinstance(phase, Phase) and phase.peak <= self.chip.memory

    def largest_micro_batch(self) -> int | None:
        """The largest micro-batch of an update that fits, in trajectories per device; None if none fits.

        It is found by bisection over the divisors of the device's trajectories.
        """
        mine = self.config.training.trajectories // self.mesh.size
        sizes = [n for n in range(1, mine + 1) if mine % n == 0]
        fitting, beyond = -1, len(sizes)
        while beyond - fitting > 1:
            middle = (fitting + beyond) // 2
            trainer = replace(self.trainer, micro_batches=mine // sizes[middle])
            if self.fits(self.compile("update", trainer)):
                fitting = middle
            else:
                beyond = middle
        return sizes[fitting] if fitting >= 0 else None

    def _compiler_options(self) -> dict[str, Any]:
        if self.chip.kind == "gpu":
            return {"xla_gpu_enable_triton_gemm": False}  # Triton's kernels for the UNet fail without a GPU to tune on
        return {} if self.full_effort else {"exec_time_optimization_effort": -1.0}

    def phase(self, name: str, trainer: Trainer) -> tuple[Any, tuple[Any, ...]]:
        """The function of the phase and the shapes of its arguments."""
        c, everywhere = self.config, lambda tree: placed(tree, self.mesh, EVERYWHERE)
        frozen = everywhere(trainer.frozen_params)
        state = everywhere(jax.eval_shape(lambda: trainer.first_state(0, c.lora.rank, c.lora.layers)))
        count = c.training.trajectories
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        ids = jax.ShapeDtypeStruct((count,), jnp.int32)
        given = (frozen, state.params, placed(keys, self.mesh, SPLIT), placed(ids, self.mesh, SPLIT))
        if name == "rollout":
            return trainer.rollout, given
        sampled = jax.eval_shape(trainer.rollout, *given)
        weight = placed(trainer.told(sampled.scalars, count)[0], self.mesh, SPLIT)
        return trainer.update, (frozen, state, placed(sampled.data, self.mesh, BY_UPDATE), weight)


def abstract_trainer(config: Settings, mesh: Mesh) -> Trainer:
    """The trainer of a run with shapes instead of weights."""
    base, reward = abstract_model(config.model, DTYPES[config.model_dtype]), load_reward(config.reward, weights=False)
    # If the reward does not need the prompts, a prompt set on the hub need not be downloaded.
    prompts = ("",) * _PROMPTS if config.reward in ABSTRACT else prompts_of(config)
    table = abstract_table(base, reward, table_rows(len(prompts), config.training.trajectories), prompts[0])
    return assemble(config, mesh, base, reward, table, len(prompts))
