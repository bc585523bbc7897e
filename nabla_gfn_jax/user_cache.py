"""The folder for files that are kept between runs and can be recreated."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder `name` of this package in $XDG_CACHE_HOME or ~/.cache. The folder is not created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nabla_gfn_jax" / name
