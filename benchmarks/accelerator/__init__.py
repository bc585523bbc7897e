"""What one accelerator makes of the true sizes.

    python -m benchmarks accelerator --out=FILE.json

Stable Diffusion 1.5, HPS and the paper's correction network have their true sizes and random weights: nothing is
downloaded. After every row FILE.json is written, and the same as a table in FILE.md. What the workers print is in
FILE.log. Lines prepare beside each other, each in a process of its own, and measure one at a time; while one takes
times the others are stopped. A line that takes too long is cut, and at the end of the seconds everything is. `--small`
does the quicker lines at sizes that a CPU does in a minute.
"""
