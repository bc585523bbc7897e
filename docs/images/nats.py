"""Makes docs/images/nats.png: `python docs/images/nats.py`. Policies in the plane, judged by their own samples."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.metrics.certificate import Paths, certify
from nabla_gfn_jax.metrics.tilt import log_z, tilt_to
from nabla_gfn_jax.studies.mixture2d import DATA, REWARDS

REWARD, SAMPLES = REWARDS["doubled"], 20_000
CHAIN = stable_diffusion_chain(STABLE_DIFFUSION, 200)
TARGET = DATA.tilted(REWARD)  # P_base · R


def predict(policy, x, level, condition):
    """The base model's noise prediction, a part of the target's, or one that pushes every sample along the reward."""
    base = DATA.noise_prediction(x, level.signal)
    if policy is None:
        return base
    towards_target, push = policy
    change = TARGET.noise_prediction(x, level.signal) - base
    along = jnp.sqrt(1 - level.signal)[:, None] * jnp.asarray(REWARD, jnp.float32)[None]
    return base + towards_target * change - push * along


def paths(policy):
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(SAMPLES))
    found = jax.jit(lambda policy: sample_paths(predict, policy, CHAIN, keys, (2,), ()))(policy)
    log_reward = np.asarray(found.latents, np.float64) @ REWARD
    return Paths(log_reward, np.asarray(found.spent), np.asarray(found.log_ratio), np.zeros(SAMPLES, int))


def main():
    base = paths(None)
    policies = {"along ∇R at every step": (0.0, 0.45), "half of the way": (0.5, 0.0), "all of the way": (1.0, 0.0)}
    judged = {name: certify(paths(policy), base, 1.0) for name, policy in policies.items()}
    judged = {"base model": certify(base, base, 1.0)} | judged
    for name, found in judged.items():
        print(name, *(getattr(found, f) for f in ("log_reward", "needed", "spent", "efficiency")), found.at_beta.gap)

    figure, axes = plt.subplots(figsize=(8.0, 5.2), dpi=110, layout="constrained")
    write = functools.partial(axes.text, fontsize=10)
    rewards = np.linspace(base.log_reward.mean(), 2.35, 80)
    needed = np.array([tilt_to(r, base.log_reward).needed for r in rewards])
    axes.fill_between(rewards, needed, -1.3, color="0.93", lw=0)
    axes.plot(rewards, needed, color="black", lw=2)
    axes.plot(rewards, rewards - log_z(base.log_reward).value, color="tab:blue", lw=1.2, ls="--")
    write(1.5, -0.55, "no model is here", color="0.45")
    write(2.1, 1.0, r"needed: $P_{base}\,R^{\,b}$, slope $b$", ha="right")
    write(0.75, -0.72, r"slope $\beta$: touches the curve at $P_{base}\,R^{\,\beta}$", color="tab:blue")
    for (name, found), color in zip(judged.items(), ("black", "tab:red", "tab:orange", "tab:green"), strict=True):
        r, spent, gap = found.log_reward.value, found.spent.value, found.at_beta.gap.value
        axes.plot(r, spent, "o", color=color, ms=8, zorder=3)
        if gap > 0.1:
            axes.annotate("", (r, spent - gap), (r, spent), arrowprops={"arrowstyle": "<->", "color": color})
            side, ha = (0.03, "left") if name == "base model" else (-0.03, "right")
            write(r + side, spent - max(0.55 * gap, 0.2), f"gap {gap:.2f}", color=color, ha=ha)
            write(r, spent + 0.06, name, color=color, ha=ha)
        else:
            write(r + 0.04, spent - 0.04, f"{name}:\ngap {gap:.2f}", color=color, va="top")
    axes.set(xlim=(0.05, 2.35), ylim=(-1.2, 1.25), xlabel="mean log R of the samples", ylabel="nats spent")
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
