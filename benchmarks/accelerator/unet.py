"""Measures the UNet alone: value and input gradient, for several batch sizes, with and without rematerialisation."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.sizes import Size, Weights, chip_of
from benchmarks.accelerator.worker import Worker, seconds
from nabla_gfn_jax.flops import flops_of
from nabla_gfn_jax.planning.chips import Chip

_BATCHES = (8, 32, 96)


def run(worker: Worker, stage: str) -> None:
    """Measures in bfloat16. FLOPs do not include recomputation."""
    size, weights = Size(worker.small), Weights()
    pieces = size.pieces(size.config())
    shapes = pieces.base.params["unet"]
    width = pieces.base.unet.config.cross_attention_dim

    def inputs(batch: int) -> tuple[Any, ...]:
        shape = (batch, *pieces.base.latent_shape)
        return weights.normal(shape), jnp.full(batch, 501, jnp.int32), weights.normal((batch, 77, width))

    def build(batch: int, remat: bool) -> Any:
        model = pieces.base.unet.clone(remat=remat)

        def both(params: Any, x: Any, t: Any, context: Any) -> Any:
            output, pull = jax.vjp(lambda x: model.apply({"params": params}, x, t, context), x)
            return pull(output)[0]

        traced = jax.jit(both).trace(shapes, *inputs(batch))
        return flops_of(traced.jaxpr), traced.lower().compile()

    cases = [(batch, remat) for batch in ((2,) if worker.small else _BATCHES) for remat in (False, True)]
    with ThreadPoolExecutor() as pool:
        built = list(pool.map(lambda case: worker.attempt(str(case), lambda: build(*case)), cases))
    params = weights.like(shapes)
    worker.wait("ready")
    on_device, chip = jax.device_put(params), chip_of(jax.local_devices()[0])
    plain = {batch: sum(b[0].values()) for (batch, remat), b in zip(cases, built, strict=True) if b and not remat}
    for (batch, remat), found in zip(cases, built, strict=True):
        if found:
            arguments, compiled = (on_device, *jax.device_put(inputs(batch))), found[1]
            what = f"value and gradient of {batch}, {'remat' if remat else 'no remat'}"
            flops = plain.get(batch, 0.0)
            worker.attempt(what, lambda c=compiled, a=arguments, w=what, f=flops: _measure(worker, w, c, a, f, chip))


def _measure(worker: Worker, what: str, compiled: Any, arguments: Any, flops: float, chip: Chip | None) -> None:
    taken = min(seconds(lambda: jax.block_until_ready(compiled(*arguments)), rounds=5, enough=2.0))
    worker.row(
        what,
        seconds=taken,
        images_a_second=len(arguments[1]) / taken,
        TFLOP_a_second=flops / taken / 1e12,
        share_of_the_peak=f"{flops / taken / chip.flops:.0%}" if chip else None,
        temporaries_GiB=compiled.memory_analysis().temp_size_in_bytes / 2**30,
    )
