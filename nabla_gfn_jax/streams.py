"""Named streams of random numbers, so that two uses of one key never draw the same numbers."""

import zlib

import jax

from nabla_gfn_jax.typing import PRNGKey


def stream(key: PRNGKey, name: str) -> PRNGKey:
    """The key of the stream `name`, derived from the key of a sample or of a run."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
