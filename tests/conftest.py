"""Strict settings for all tests: no silent promotion of dtypes or ranks, several devices, one compilation cache."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's spinning threads starve XLA's on few cores
# Programs that tests start have the package that the tests have, whichever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

import jax
import jaxtyping
import numpy as np
import pytest
import torch

# Shapes and types of every call are checked against its signature; where it says a JAX array, NumPy's will do. Left out
# are the modules whose dataclasses are trees, which JAX fills with what is no array, and those that tests hand fakes.
CHECKED = (
    *("models", "rewards", "metrics", "data", "studies.mixture", "evaluate", "images"),
    *("emoji.drawings", "emoji.captions", "emoji.perturb", "emoji.byte_pairs", "emoji.features", "emoji.miniature"),
    *("emoji.fit_atlas", "emoji.fit_recognisability", "emoji.fit_valence"),
    *("algorithms.base", "algorithms.credit", "algorithms.nabla_db"),
    *("checkpoints.files", "checkpoints.lora_file", "checkpoints.torch_layout", "checkpoints.torch_pickle"),
    "checkpoints.weights",
)
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook([f"nabla_gfn_jax.{name}" for name in CHECKED], "strict_types.check")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "nabla_gfn_jax-test-cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

from tiny_run import command, tiny_model  # noqa: E402, F401  fixtures, of modules imported under the settings above


@pytest.fixture(autouse=True, scope="module")
def torch_autograd(request):
    """PyTorch's autograd is off in the modules that use `torch_oracle`, which enable it when needed, and on in the
    others.
    """
    before = torch.is_grad_enabled()
    torch.set_grad_enabled("torch_oracle" not in Path(request.module.__file__).read_text())
    yield
    torch.set_grad_enabled(before)
