"""The log of a run has every epoch once, also after a crash or damage to the file, and documents its columns."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.runs import metrics_log
from nabla_gfn_jax.runs.metrics_log import COLUMNS, MetricsLog


def open_log(workdir, first=0, **options):
    return MetricsLog(workdir, first, **({"run_id": "abc", "config": {}} | options))


def write(workdir, epochs, first=0, **options):
    log = open_log(workdir, first, **options)
    for epoch in epochs:
        log.write({"epoch": epoch, "loss": 0.5 * epoch})
    log.close()


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


EXPECTED = [{"epoch": epoch, "loss": 0.5 * epoch} for epoch in range(5)]


def test_a_resumed_log_repeats_no_row(tmp_path):
    write(tmp_path, range(4))
    write(tmp_path, range(2, 5), first=2)
    assert rows(tmp_path) == EXPECTED


@pytest.mark.parametrize(
    "broken", ['{"epoch": 1, "lo', "{}\n", "[]\n", "3\n", "\n", '{"epoch": null}\n', "\0\0\0\0\n", "\xff\n"]
)
@pytest.mark.parametrize("where", ["last", "middle", "first"])
def test_a_broken_line_is_left_out_and_stops_nothing(tmp_path, broken, where, capsys):
    write(tmp_path, range(4))
    file = tmp_path / "metrics.jsonl"
    lines = [line.encode() for line in file.read_text().splitlines(keepends=True)]
    place = {"first": 0, "middle": 2, "last": 4}[where]
    ending = b"" if where == "last" or broken.endswith("\n") else b"\n"
    lines.insert(place, broken.encode("latin1") + ending)
    file.write_bytes(b"".join(lines))
    write(tmp_path, range(3, 5), first=3)
    assert rows(tmp_path) == EXPECTED
    told = capsys.readouterr().err
    assert (f"line {place + 1} cannot be read" in told) == (where != "last")


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """null is accepted by every JSON reader."""
    log = open_log(tmp_path)
    log.write({"epoch": 0, "loss": math.nan, "reward_mean": math.inf, "seconds": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"epoch": 0, "loss": None, "reward_mean": None, "seconds": 1.0}


def test_a_process_that_does_not_write_writes_nothing(tmp_path):
    write(tmp_path, range(3), write=False, tensorboard=True, wandb=True, trackio=True)
    assert not list(tmp_path.iterdir())


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """The numbers in TensorBoard's files. A record is length (8 bytes), checksum (4), event, checksum (4)."""
    found = []
    for file in folder.iterdir():
        data, start = file.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            start += length + 16
    return sorted(found)


@pytest.mark.parametrize("asked_before", [True, False])
def test_tensorboard_has_each_row_once_after_a_resume(tmp_path, asked_before):
    """This also holds if TensorBoard is first requested at the resume, or if a file was cut short."""
    write(tmp_path, range(4), tensorboard=asked_before)
    for file in (tmp_path / "tensorboard").glob("*"):
        file.write_bytes(file.read_bytes()[:-5])
        file.rename(f"{file}.of_another_second")  # the library names them by the second
    write(tmp_path, range(2, 5), first=2, tensorboard=True)
    expected = [(name, row["epoch"], value) for row in EXPECTED for name, value in row.items()]
    assert scalars(tmp_path / "tensorboard") == sorted(expected)


@pytest.fixture
def wandb(monkeypatch):
    """A fake Weights & Biases: the runs by id, with their logged rows."""
    runs = {}

    def init(*, project, dir, config, id, name, resume):
        assert resume == "allow"
        run = runs.setdefault(id, SimpleNamespace(name=name, logged=[], finished=0))

        def log(row, step):
            if all(step > before for before, _ in run.logged):  # as its server does
                run.logged.append((step, row))

        def finish():
            run.finished += 1

        return SimpleNamespace(log=log, finish=finish)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return runs


def test_weights_and_biases_goes_on_with_its_own_run(wandb, tmp_path):
    """Two workdirs with the same name are two runs; a resumed run is one."""
    for folder in ("hps/seed0", "aesthetic/seed0"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "hps/seed0", range(4), wandb=True, run_id="1")
    write(tmp_path / "hps/seed0", range(2, 5), first=2, wandb=True, run_id="1")
    write(tmp_path / "aesthetic/seed0", range(1), wandb=True, run_id="2")
    assert [row for _, row in wandb["1"].logged] == EXPECTED
    assert [row for _, row in wandb["2"].logged] == EXPECTED[:1]
    assert {run.name for run in wandb.values()} == {"seed0"}
    assert wandb["1"].finished == 2


@pytest.fixture
def trackio(monkeypatch):
    """A fake trackio: the runs by name, with every row that was logged; on a server, its `Api` sees none of them."""
    runs = {}

    class Api:
        def runs(self, project):
            assert project == "nabla_gfn_jax"
            if not runs:
                raise ValueError(f"Project '{project}' does not exist")
            return [SimpleNamespace(name=name, delete=lambda name=name: runs.pop(name)) for name in list(runs)]

    def init(*, project, name, config, resume, embed, auto_log_gpu, auto_log_cpu):
        assert (project, resume, embed, auto_log_gpu, auto_log_cpu) == ("nabla_gfn_jax", "allow", False, False, False)
        run = runs.setdefault(name, SimpleNamespace(logged=[], finished=0, config=config))

        def finish():
            run.finished += 1

        return SimpleNamespace(log=lambda row, step: run.logged.append((step, row)), finish=finish)

    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init, Api=Api))
    return runs


def test_trackio_has_each_row_once_after_a_resume(trackio, tmp_path):
    """Two workdirs with the same name are two runs; the rows from before it was requested are there too."""
    for folder in ("hps/seed0", "aesthetic/seed0"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "hps/seed0", range(1), trackio=False, run_id="1" * 36)
    write(tmp_path / "hps/seed0", range(1, 4), first=1, trackio=True, run_id="1" * 36)
    write(tmp_path / "aesthetic/seed0", range(1), trackio=True, run_id="2" * 36)
    write(tmp_path / "hps/seed0", range(2, 5), first=2, trackio=True, run_id="1" * 36)
    assert set(trackio) == {"seed0-11111111", "seed0-22222222"}
    assert trackio["seed0-11111111"].logged == [(row["epoch"], row) for row in EXPECTED]
    assert trackio["seed0-22222222"].logged == [(0, EXPECTED[0])]
    assert trackio["seed0-11111111"].finished == 1


def test_trackio_on_a_server_goes_on(trackio, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    write(tmp_path, range(4), trackio=True)
    write(tmp_path, range(2, 5), first=2, trackio=True)
    (run,) = trackio.values()
    assert [step for step, _ in run.logged] == [0, 1, 2, 3, 2, 3, 4]
    assert dict(run.logged) == {row["epoch"]: row for row in EXPECTED}


def test_a_trackio_that_fails_stops_nothing(trackio, tmp_path, monkeypatch, capsys):
    def refuse(**options):
        raise ValueError("Project name is not allowed")

    monkeypatch.setattr(sys.modules["trackio"], "init", refuse)
    write(tmp_path, range(3), trackio=True)
    assert rows(tmp_path) == EXPECTED[:3]
    assert "trackio gets no rows (Project name is not allowed); the run goes on" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_real_trackio_has_the_rows(tmp_path):
    """In a process of its own, because trackio chooses its folder when it is imported."""
    pytest.importorskip("trackio")
    script = f"""
import json, math
from pathlib import Path
from nabla_gfn_jax.runs.metrics_log import MetricsLog
for first, last in ((0, 4), (2, 5)):
    log = MetricsLog(Path({str(tmp_path / "seed0")!r}), first, run_id="1" * 36, config={{"a": 1}}, trackio=True)
    for epoch in range(first, last):
        log.write({{"epoch": epoch, "step": 4 * epoch, "loss": math.nan if epoch == 1 else 0.5 * epoch}})
    log.close()
from trackio.sqlite_storage import SQLiteStorage
logged = SQLiteStorage.get_logs("nabla_gfn_jax", "seed0-11111111")
print("FOUND", json.dumps([[row["step"], row["policy_step"], row["loss"]] for row in logged]))
"""
    (tmp_path / "seed0").mkdir()
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert "the run goes on" not in done.stderr
    found = json.loads(done.stdout.rpartition("FOUND ")[2].splitlines()[0])
    assert [[step, policy] for step, policy, _ in found] == [[epoch, 4 * epoch] for epoch in range(5)]
    assert [loss for *_, loss in found[2:]] == [1.0, 1.5, 2.0]


def test_what_a_run_writes_survives_the_next_moment(tmp_path, monkeypatch):
    """Each row is on the disk when `write` returns, before the checkpoint of its epoch."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write(tmp_path, range(3))
    assert synced == [len('{"epoch": 0, "loss": 0.0}\n') * n for n in (1, 2, 3)]


def test_columns_are_documented_once_and_the_page_has_them():
    names = [column.name for column in COLUMNS]
    assert len(names) == len(set(names))
    assert all(column.of and column.meaning for column in COLUMNS)
    assert metrics_log.table() in (Path(__file__).parents[1] / "docs/log.md").read_text()


def test_a_logger_that_is_not_installed_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr("nabla_gfn_jax.runs.metrics_log.find_spec", lambda name: None)
    nothing = {"tensorboard": False, "wandb": False, "trackio": False}
    metrics_log.check_sinks(**nothing)
    for option, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")):
        wanted = nothing | {option: True}
        with pytest.raises(UserError, match=rf"logging\.{option} needs {package}; pip install"):
            metrics_log.check_sinks(**wanted)
