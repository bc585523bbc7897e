"""Builds the pages of the Python API from its docstrings: `python docs/site/build.py [FOLDER]`, by default build/site.

The pages need no network, neither to be built nor to be read. pdoc makes them (`pip install -e '.[docs]'`). The first
page is docs/python.md.
"""

import re
import sys
from pathlib import Path
from posixpath import normpath

from pdoc import pdoc, render

from nabla_gfn_jax import __version__

HERE = Path(__file__).parent
# The API, and what its functions take, return and raise.
MODULES = (
    "nabla_gfn_jax.api",
    "nabla_gfn_jax.errors",
    "nabla_gfn_jax.inference.sampling",
    "nabla_gfn_jax.inference.evaluation",
    "nabla_gfn_jax.metrics.certificate",
    "nabla_gfn_jax.metrics.tilt",
    "nabla_gfn_jax.base_models.stable_diffusion",
    "nabla_gfn_jax.rewards.reward",
)
_LINK = re.compile(r"\[([^]]+)\]\(([\w./]+)(?:#[\w-]+)?\)")  # to another file of the repository, which is not copied


def build(folder: Path) -> None:
    """Writes the pages into the folder."""
    render.configure(docformat="google", template_directory=HERE, footer_text=f"nabla_gfn_jax {__version__}")
    guide = (HERE.parent / "python.md").read_text(encoding="utf-8")
    render.env.globals["guide"] = _LINK.sub(lambda link: f"{link[1]} ({normpath(f'docs/{link[2]}')})", guide)
    pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    target = Path(*sys.argv[1:2] or ("build/site",))
    build(target)
    print(f"open {target}/index.html")
