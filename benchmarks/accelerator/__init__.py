"""Measures full-size models on one accelerator.

    python -m benchmarks accelerator --out=FILE.json

Stable Diffusion 1.5, HPS and the paper's correction network have their full sizes and random weights, so nothing is
downloaded. After every row, FILE.json is written, and the same rows as a table in FILE.md. FILE.log has the output of
the workers. A *line* is a group of measurements in one process. Lines prepare simultaneously and measure one at a time;
while one line measures times, the others are stopped. A line that takes too long is ended, and after `--seconds`
everything is ended. `--small` runs the quicker lines at sizes that take a minute on a CPU.
"""
