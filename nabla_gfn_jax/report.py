"""Writes the report of one or more runs: `python -m nabla_gfn_jax.report runs/emoji/seed0 runs/emoji/seed1`.

The report is one HTML file that opens from the disk, without a network: curves, pictures of the same noise over the
updates and side by side across runs, the trade-off of reward and nats, and the runs' configs (docs/report.md). It shows
what the workdirs hold. With `--draw`, it first draws the pictures of saved LoRAs that have none yet, and measures how
much more probable each LoRA has made the base model's pictures, which loads the base model and the reward. The workdirs
keep both.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.checkpoints.files import check_can_write
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.inference.sampling import CPU_BATCH
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.parallel import require_devices, use_cpu_cores
from nabla_gfn_jax.reports import drawing, page, source


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The runs, and the file."""

    workdir: tuple[Path, ...] = option(
        (), "folders of runs, to be compared with each other", positional=True, empty=True, file="existing"
    )
    out: Path | None = option(
        None, "file to write [report.html in the workdir or, of several runs, here]", file="output", endings=(".html",)
    )
    draw: bool = option(
        False, "draw the pictures of saved LoRAs that have none yet, and measure the base pictures' chances"
    )
    batch: int = option(0, "images drawn together; 0: as many as are likely to fit", minimum=0)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Draws what is missing if asked, and writes the file."""
    options = parse(argv, Options, __doc__)
    if not options.workdir:
        raise UserError("no workdir is given; name the workdir of a run, as in nabla-gfn report runs/emoji/seed0")
    out = options.out or (options.workdir[0] / page.NAME if len(options.workdir) == 1 else Path(page.NAME))
    source.read(options.workdir)  # a mistake is told before any drawing
    check_can_write(out)
    if options.draw:
        use_compilation_cache()
        use_cpu_cores(CPU_BATCH)
        require_devices()
        for workdir in options.workdir:
            drawing.draw(workdir, options.batch)
    page.write(out, options.workdir)
    left = sum(len(drawing.missing(workdir)) for workdir in options.workdir)
    hint = f"; {left} saved models have no pictures yet, --draw draws them" if left else ""
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB){hint}")


if __name__ == "__main__":
    main(sys.argv)
