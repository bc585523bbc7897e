"""Every test runs strict: no silent promotion of dtypes or ranks, several devices, one compilation cache."""

import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's spinning threads starve XLA's on few cores

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "nabla_gfn_jax-test-cache")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
