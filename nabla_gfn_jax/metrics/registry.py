"""The metrics that `evaluate --metrics` offers. Each needs a network; a new one is a line here."""

from collections.abc import Callable

from nabla_gfn_jax.metrics import clip, cmmd, dreamsim, fid
from nabla_gfn_jax.metrics.base import Released

METRICS: dict[str, Callable[[], Released]] = {
    "fid": fid.fid,
    "cmmd": cmmd.cmmd,
    "clip": clip.clip,
    "dreamsim": dreamsim.ensemble,
    "dreamsim_dino": dreamsim.single,
}
