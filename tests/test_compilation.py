"""The folder of compiled programs, tested in a separate process for each case, as for a user."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from nabla_gfn_jax.compilation import use_compilation_cache
use_compilation_cache()
jax.jit(lambda x: x + 1)(jnp.ones(3))
"""


@pytest.mark.parametrize("named", [True, False])
def test_small_programs_are_kept_too_in_the_named_folder_or_the_users(tmp_path, named):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "user")
    if named:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "named")
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    kept = sorted(file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("jit__lambda*-cache"))
    assert kept == ["named" if named else "user"]
