"""Where things that can be made again are kept between runs."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder `name` in this package's part of the user's cache, $XDG_CACHE_HOME or ~/.cache; not yet made."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nabla_gfn_jax" / name
