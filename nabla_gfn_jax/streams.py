"""Named streams of random numbers, so that no two uses of a key draw the same ones."""

import zlib

import jax

from nabla_gfn_jax.typing import PRNGKey


def stream(key: PRNGKey, name: str) -> PRNGKey:
    """The key of the stream `name` under `key`: one key, as of a sample or a run."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
