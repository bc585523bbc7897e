"""Workdirs with known contents for the tests of the report, written without training."""

import json
from pathlib import Path

import numpy as np

from nabla_gfn_jax.inference.evaluation import BASE_SAMPLES, DESCRIBED, Evaluation, kept_name
from nabla_gfn_jax.inference.table import to_json
from nabla_gfn_jax.metrics.certificate import Paths, certify
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.runs import evaluations, pictures
from nabla_gfn_jax.runs.manifest import Manifest
from nabla_gfn_jax.runs.pictures import Pictures

SIDE, UPDATES, EPOCHS = 16, (0, 4, 8), 4
PROMPTS = ("a face", "an animal")


def colour(updates: int, number: int, seed: int) -> tuple[int, int, int]:
    """A picture's only colour: the base model's depends on the noise alone."""
    return (40 + 6 * number, 200 - 8 * updates - 16 * seed, 90)


def score(updates: int, number: int, seed: int) -> float:
    """A picture's log R: noise 0 is the best of the base model and gains least."""
    return 0.1 * (8 - number) + updates * (0.02 * number + 0.01 * seed)


def chance(updates: int, number: int) -> float:
    """The log chance of a base picture: the best pictures of the base model become rarest."""
    return 0.1 * updates * (number - 4)


def write_pictures(workdir: Path, seed: int = 0, prompts=PROMPTS, updates=UPDATES, count: int = 16, side: int = SIDE):
    of = pictures.kept(prompts, count)
    for n in updates:
        images = np.zeros((len(of), side, side, 3), np.uint8)
        images[:] = np.array([colour(n, p.number, seed) for p in of], np.uint8)[:, None, None]
        images[:, : side // 2, : side // 2] = 255  # a corner, so that a picture that is turned or cut differs
        found = {} if n == 0 else {pictures.CHANCE: tuple(chance(n, p.number) for p in of)}
        found |= {"log_reward": tuple(score(n, p.number, seed) for p in of), "log_reward_a": (0.5,) * len(of)}
        pictures.save(pictures.place(workdir, n), Pictures(of, images, found))


def write_log(workdir: Path, seed: int = 0, epochs: int = EPOCHS):
    """Rows of an off-policy run with 2 updates per epoch; epochs 0 and 1 sample from the same policy."""
    rows = [{"epoch": e, "step": 2 * max(e - 1, 0), "updates": 2 * min(e, epochs)} for e in range(epochs + 2)]
    for row in rows:
        e = row["epoch"]
        row |= {"reward_mean": 0.1 * e + 0.2 * seed, "reward_std": 0.8, "seconds": 30.0}
        if 0 < e <= epochs:
            row |= {"loss": 2.0**-e, "loss_forward": 2.0**-e, "grad_norm_lora": 1.0}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluations(workdir: Path, seed: int = 0, updates=UPDATES, samples: int = 200):
    """Certificates of policies that raise log R by moving every sample, which wastes nats."""
    what = dict(zip(DESCRIBED, ("emoji", "float32", {"steps": 5}, list(PROMPTS), "valence", {}), strict=True))
    rng = np.random.default_rng(7)
    prompt, reward = np.repeat([0, 1], samples), rng.normal(0, 1, 2 * samples)
    base = Paths.of_base(reward, prompt)
    for n in updates:
        shift = 0.2 * n * (1 + 0.1 * seed)
        spent = np.full((2 * samples, 5), shift**2 / 5)
        policy = Paths(reward + shift, spent, -spent.sum(1), prompt)
        certificate = certify(base if n == 0 else policy, base, beta=2.0)
        figures = {"fid": Estimate(3.0 + n, 0.5), "entropy_over_vendors": Estimate(1.0 - 0.02 * n, 0.01)}
        tilted = {"entropy_over_vendors": Estimate(0.95 - 0.01 * n, 0.02), "effective_samples": Estimate(90.0)}
        few = {"entropy_over_vendors": Estimate(0.9 - 0.02 * n, 0.015), "effective_samples": Estimate(90.0)}
        row = to_json(Evaluation(figures, certificate, *((tilted, few) if n else ())))
        evaluations.append(workdir, {"model": f"lora/{n:05d}" if n else "base", "beta": 2.0} | what | row)
    (workdir / BASE_SAMPLES).mkdir()
    arrays = {"prompt": prompt, "log_reward": reward}
    with (workdir / BASE_SAMPLES / kept_name(what, ["nats"])).open("wb") as file:
        np.savez(file, **{f"nats/{name}": array for name, array in arrays.items()})


def write_run(workdir: Path, seed: int = 0, prompts=PROMPTS, **fields) -> Path:
    """A whole workdir. `fields` are added to the config's top level."""
    workdir.mkdir(parents=True)
    config = {"seed": seed, "training": {"trajectories": 16, "num_epochs": EPOCHS}, "algorithm": {"beta": 2.0}}
    about = {"model": "emoji", "prompts": "given", "reward": "valence", "algorithm": "residual_nabla_db", "beta": 2.0}
    start = {"time": "2026-11-26T12:00:00+00:00", "host": "secret-host", "process": 4711}
    start |= {"versions": {"python": "3.11.7", "jax": "0.10.2"}, "devices": {"kind": "cpu", "count": 1}}
    Manifest(id="0" * 32, config=config | fields, **about, starts=(start,)).write(workdir)
    write_log(workdir, seed)
    write_evaluations(workdir, seed)
    write_pictures(workdir, seed, prompts)
    return workdir
