"""What is written into a workdir is whole, whoever reads it and whenever the run ends."""

import json
import threading

from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.metrics_log import MetricsLog
from nabla_gfn_jax.workdir import claim_workdir

CONFIG = load_settings(Settings, "emoji")


def test_a_process_reads_the_config_while_another_writes_it(tmp_path):
    """As when all processes of a run are started again at once."""
    claim_workdir(tmp_path, CONFIG)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            claim_workdir(tmp_path, CONFIG)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            claim_workdir(tmp_path, CONFIG, write=False)
    finally:
        stop.set()
        writer.join()


def test_a_resumed_log_has_neither_repeated_rows_nor_one_that_was_cut_short(tmp_path):
    log = MetricsLog(tmp_path, 0, CONFIG)
    for step in range(4):
        log.write({"step": step, "loss": float("nan")})
    log.close()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 1, "lo')
    MetricsLog(tmp_path, 2, CONFIG).write({"step": 2, "loss": 0.5})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"step": 0, "loss": None}, {"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]
