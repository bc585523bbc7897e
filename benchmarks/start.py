"""The time from the start of `train` to the end of the first updates, with an empty and a full compilation cache."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


def run() -> Iterator[tuple[str, str, str, str]]:
    """Times `configs/emoji.py`. The compilation cache is in the user's cache folder, as in a run."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            yield (
                f"(e) start to first updates, configs/emoji.py, {name}",
                "",
                f"{_first_update(Path(folder), name):.0f} s",
                "",
            )


def _first_update(folder: Path, name: str) -> float:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    workdir = folder / name
    flags = ["--config=emoji", f"--workdir={workdir}", "--config.training.num_epochs=40"]
    start = time.time()
    command = [sys.executable, "-m", "nabla_gfn_jax.train", *flags]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = workdir / "metrics.jsonl"
    try:
        while not (log.exists() and any(json.loads(row)["epoch"] == 1 for row in log.read_text().splitlines())):
            assert process.poll() is None, "the run ended"
            time.sleep(0.2)
        return time.time() - start
    finally:
        process.kill()
        process.wait()
