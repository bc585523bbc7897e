"""Formats a plan as text."""

import jax

from nabla_gfn_jax.planning.chips import GIB
from nabla_gfn_jax.planning.phases import Phase, Plan

ASSUMED_SHARE = 0.4  # of the peak rate, if the compiler has no estimate


def show(plan: Plan, phases: dict[str, Phase | str], title: str) -> str:
    """The text of a plan: the devices, each phase's memory, work and time on one device, and the time of the run."""
    c, chip, devices = plan.config.training, plan.chip, plan.mesh.size
    lines = [
        f"{title}: {devices} devices, each {chip.memory / GIB:.2f} GiB for programs, "
        f"{chip.flops / 1e12:.0f} TFLOP/s in bfloat16, {chip.bandwidth / 1e9:.0f} GB/s",
        f"{c.trajectories} trajectories, micro-batches of {c.trajectories // devices // c.micro_batches} per device, "
        f"{c.images_at_once or 'all'} images at once",
        f"parameters: {_parameters(plan)}",
        "",
        "| per device (compiled) | arguments | temporaries | results | peak | share of its memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, phase in phases.items():
        if isinstance(phase, str):
            lines.append(f"| {name} | does not fit: {phase} | | | | |")
        else:
            sizes = (phase.arguments, phase.temporaries, phase.results, phase.peak)
            shown = " | ".join(_size(size) for size in sizes)
            lines.append(
                f"| {name} | {shown} | {phase.peak / chip.memory:.0%}{'' if plan.fits(phase) else ', too big'} |"
            )
    compiled = [phase for phase in phases.values() if isinstance(phase, Phase)]
    lines += ["", "| per device | TFLOP (counted) | GB moved, at most | collectives | cost model | at the peak rate |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [_work(plan, phase) for phase in compiled]
    if len(compiled) == 2:
        lines += ["", _run_time(plan, compiled)]
    return "\n".join(lines)


def _parameters(plan: Plan) -> str:
    def millions(tree: object) -> str:
        return f"{sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6:.1f} M"

    trainer = plan.trainer
    state = jax.eval_shape(lambda: trainer.first_state(0, plan.config.lora.rank, plan.config.lora.layers))
    frozen = trainer.frozen_params
    base = ", ".join(f"{part} {millions(tree)}" for part, tree in frozen["base"].items())
    trained = ", ".join(f"{name} {millions(tree)}" for name, tree in state.params.items())
    return f"{base}, reward {millions(frozen['reward'])}; trained: {trained}"


def _work(plan: Plan, phase: Phase) -> str:
    collectives = ", ".join(
        f"{count} {kind}, {size / 1e6:.1f} MB" for kind, (count, size) in phase.traffic.collectives.items()
    )
    by_type = " + ".join(f"{_number(flops / 1e12)} {kind}" for kind, flops in sorted(phase.flops.items()))
    unknown = phase.traffic.unknown_loops
    at_most = _number(phase.traffic.bytes / 1e9) + (f" ({unknown} loops counted once)" if unknown else "")
    estimate = plan.estimated_seconds(phase)
    best = plan.least_seconds(phase)
    cost = "none" if estimate is None else f"{_duration(estimate)}, {best / estimate:.0%} of the peak"
    updates = plan.config.training.updates_per_epoch
    name = f"{updates} updates" if phase.name == "update" and updates > 1 else phase.name
    return f"| {name} | {by_type} | {at_most} | {collectives or 'none'} | {cost} | {_duration(best)} |"


def _run_time(plan: Plan, phases: list[Phase]) -> str:
    estimates = [plan.estimated_seconds(phase) for phase in phases]
    if None in estimates:
        seconds = sum(plan.least_seconds(phase) for phase in phases) / ASSUMED_SHARE
        source = f"assuming {ASSUMED_SHARE:.0%} of the peak rate"
    else:
        seconds, source = sum(s for s in estimates if s), "by the compiler's cost model"
    updates = plan.config.training.updates_per_epoch
    return (
        f"one epoch ({updates} update{'s' * (updates > 1)}): {_duration(seconds)}, 200 updates: "
        f"{_duration(200 / updates * seconds)}, {source}; estimated, not measured"
    )


def _number(value: float) -> str:
    """The number with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.2g} s"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
