"""XLA's persistent compilation cache, on by default: a run's second start reads its programs instead of compiling."""

import os

import jax

from nabla_gfn_jax.user_cache import user_cache


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, or in JAX_COMPILATION_CACHE_DIR if it is set.

    Small programs are kept too, because together they take seconds to compile.
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS overrides this.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache("xla")))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
