"""What a report says: numbers of its curves, frontier and pictures, and text that can do no harm."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from reported import PROMPTS, UPDATES, score, write_evaluations, write_log, write_pictures, write_run

from nabla_gfn_jax import report
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.reports import gallery as galleries
from nabla_gfn_jax.reports import page, source
from nabla_gfn_jax.reports.about import HIDDEN, shown
from nabla_gfn_jax.reports.curves import charts
from nabla_gfn_jax.reports.evaluated import evaluated
from nabla_gfn_jax.reports.plane import frontier
from nabla_gfn_jax.runs import evaluations, manifest
from nabla_gfn_jax.runs.pictures import Pictures, kept
from nabla_gfn_jax.training.showing import Showing

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'and' & more"


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two runs that differ by the seed, and one with another learning rate."""
    root = tmp_path_factory.mktemp("runs")
    seeds = [write_run(root / f"emoji/seed{seed}", seed) for seed in (0, 1)]
    return [*seeds, write_run(root / "faster/seed0", 0, learning_rate=1.0)]


@pytest.fixture(scope="module")
def data(workdirs):
    return page.contents(source.read(workdirs))


def by_title(data, title):
    return next(chart for chart in data["charts"] if chart["title"] == title)


@pytest.mark.thorough
def test_runs_are_grouped_by_what_determines_their_numbers(data):
    assert [run["name"] for run in data["runs"]] == ["emoji/seed0", "emoji/seed1", "faster/seed0"]
    assert [run["group"] for run in data["runs"]] == [0, 0, 1]


def test_a_reward_belongs_to_the_policy_that_sampled(data):
    """Epochs 0 and 1 sample from the same policy: their rewards 0 and .1 are averaged, each ± .8/√16."""
    line = by_title(data, "reward_mean")["lines"][0]
    assert line["x"] == [0, 2, 4, 6, 8]
    assert line["y"] == pytest.approx([0.05, 0.2, 0.3, 0.4, 0.5])
    assert line["error"] == pytest.approx([0.2 / math.sqrt(2), *[0.2] * 4], rel=1e-4)


def test_a_loss_belongs_to_the_updates_at_the_end_of_its_epoch(data):
    line = by_title(data, "loss")["lines"][0]
    assert (line["x"], line["y"]) == ([2, 4, 6, 8], [0.5, 0.25, 0.125, 0.0625])


def test_bands_are_mean_and_standard_deviation_over_seeds(data):
    (band,) = by_title(data, "reward_mean")["bands"]
    assert (band["group"], band["runs"], band["x"]) == (0, 2, [0, 2, 4, 6, 8])
    assert band["y"] == pytest.approx([0.15, 0.3, 0.4, 0.5, 0.6])
    assert band["spread"] == pytest.approx([0.2 / math.sqrt(2)] * 5, rel=1e-4)
    names = [band["name"] for band in by_title(data, "spent and needed")["bands"]]
    assert names == ["spent", "needed"]


def test_a_long_log_is_averaged(workdirs, tmp_path):
    write_log(tmp_path, epochs=1199)
    run = source.read(workdirs)[0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (line,) = next(c for c in charts([replace(run, rows=rows)], [0], [None]) if c.title == "reward_mean").lines
    assert len(line.x) == 300
    assert line.x[:2] == [3, 11]  # of 0, 2, 4, 6 and 8, 10, 12, 14
    assert line.y[1] == pytest.approx(0.1 * 6.5)
    assert line.error[1] == pytest.approx(0.2 / math.sqrt(4))


def test_measurements_are_comparable_or_left_out(workdirs, tmp_path):
    rows = source.read(workdirs)[0].evaluations
    other = rows[-1] | {"prompts": ["a sonnet"]}
    strange = [rows[-1] | {"model": name} for name in ("lora/00008 x 0.5", "lora/../../etc/00009", "../00009", 7)]
    found = evaluated([other, *rows, *strange], False)
    assert list(found.of) == [0, 4, 8]
    assert found.what["prompts"] == list(PROMPTS)
    assert list(evaluated(rows, True).of) == [4, 8]  # update 0 of this run is not the base model
    assert list(evaluated([*rows, other], False).of) == [8]  # the newest
    assert evaluated(strange, False) is None


def test_figures_stand_beside_those_of_the_tilted_base_model(data):
    entropy, fid = data["beside"]
    assert (entropy["name"], entropy["as_few"], fid["name"], fid["as_few"]) == (
        "entropy_over_vendors",
        True,
        "fid",
        False,
    )
    assert [(p["run"], p["updates"]) for p in entropy["points"]] == [(r, u) for r in range(3) for u in UPDATES[1:]]
    last = entropy["points"][1]
    assert last["value"] == pytest.approx(0.9 - 0.02 * 8)  # at the effective sample size, not .84
    assert (last["tilted"], last["tilted_error"]) == (pytest.approx(0.87), 0.02)
    assert last["reward"] == data["plane"]["points"][2]["reward"]
    assert [(p["run"], p["updates"]) for p in fid["points"]] == [(r, u) for r in range(3) for u in UPDATES]
    assert {p["tilted"] for p in fid["points"]} == {None}


def test_the_plane_has_what_was_measured(data):
    plane = data["plane"]
    assert [(p["run"], p["updates"]) for p in plane["points"]] == [(r, u) for r in range(3) for u in UPDATES]
    last = plane["points"][2]
    assert last["spent"] == pytest.approx((0.2 * 8) ** 2, rel=1e-4)
    curve = plane["frontier"]
    assert curve["samples"] == 400
    assert np.interp(plane["points"][0]["reward"], curve["reward"], curve["needed"]) == pytest.approx(0, abs=1e-3)


def test_the_frontier_passes_through_the_needed_nats_of_the_certificates(workdirs, data):
    curve = data["plane"]["frontier"]
    for row in source.read(workdirs[:1])[0].evaluations:
        at, needed = (row["certificate"][name]["value"] for name in ("log_reward", "needed"))
        assert np.interp(at, curve["reward"], curve["needed"]) == pytest.approx(needed, rel=2e-3, abs=1e-4)


def test_the_frontier_of_a_coin_is_its_entropys():
    """log R is 0 or 1 with probability 1/2: a mean r needs log 2 + r log r + (1 − r) log(1 − r) nats."""
    reward = np.tile([0.0, 1.0], 500)
    curve = frontier(reward, np.zeros(1000, int), 0.1, 0.9)
    r = np.asarray(curve.reward)
    assert r.min() < 0.1
    assert r.max() > 0.9
    assert (np.diff(r) > 0).all()
    np.testing.assert_allclose(curve.needed, np.log(2) + r * np.log(r) + (1 - r) * np.log1p(-r), atol=1e-9)
    assert all(curve.sure)
    assert not all(frontier(reward[:20], np.zeros(20, int), 0.1, 0.9).sure)  # 20 samples: fewer than 20 effective


def test_without_base_samples_the_frontier_joins_the_certificates(tmp_path):
    run = write_run(tmp_path / "run")
    for file in (run / "base_samples").iterdir():
        file.unlink()
    curve = page.contents(source.read([run]))["plane"]["frontier"]
    assert curve["samples"] == 0
    assert len(curve["reward"]) == len(UPDATES)


def test_runs_that_were_measured_otherwise_are_left_out_of_the_plane(workdirs, tmp_path):
    other = write_run(tmp_path / "run")
    rows = [row | {"reward": "beauty"} for row in evaluations.read(other)]
    (other / evaluations.NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    plane = page.contents(source.read([workdirs[0], other]))["plane"]
    assert plane["left_out"] == [1]
    assert {p["run"] for p in plane["points"]} == {0}


def test_pictures_of_the_same_noise_stand_together(data):
    shots = data["pictures"]
    assert [(p["prompt"], p["number"]) for p in shots["of"]] == [(p, n) for p in PROMPTS for n in range(8)]
    sheets = [[shots["sheets"][i] for _, i in policies] for policies in shots["policies"]]
    assert [[updates for updates, _ in policies] for policies in shots["policies"]] == [list(UPDATES)] * 3
    for run, seed in ((0, 0), (1, 1)):
        for sheet, updates in zip(sheets[run], UPDATES, strict=True):
            expected = [score(updates, n, seed) for _ in PROMPTS for n in range(8)]
            assert sheet["scores"]["log_reward"] == pytest.approx(expected, abs=1e-4)
    assert shots["bases"] == [policies[0][1] for policies in shots["policies"]]
    assert shots["policies"][0] == shots["policies"][2]  # equal sheets are kept once


def test_a_run_from_a_lora_is_compared_with_the_base_model_not_with_its_start(tmp_path):
    run = write_run(tmp_path / "run", lora={"start_from": "some.safetensors"})
    found = source.read([run])[0]
    assert found.base is None
    (run / "pictures/00004.png").rename(run / "pictures/base.png")
    found = source.read([run])[0]
    assert list(found.pictures) == [0, 8]
    assert found.base is not None


def test_pictures_are_reduced_until_they_fit(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    run = source.read([write_run(tmp_path / "run")])[0]
    first = Pictures(kept(["a"], 2), noise, {"log_reward": (0.0, 1.0)})
    many = {n: replace(first, images=noise ^ n) for n in range(9)}
    run = replace(run, pictures=many, base=many[0])
    whole = galleries.gallery([run])
    assert {sheet.width for sheet in whole.sheets} == {96}
    size = sum(len(sheet.source) for sheet in whole.sheets)
    monkeypatch.setattr(galleries, "LARGEST", size // 8)
    small = galleries.gallery([run])
    assert sum(len(sheet.source) for sheet in small.sheets) <= size // 8
    assert {sheet.width for sheet in small.sheets} == {64}
    assert list(small.policies[0]) == [0, 4, 8]  # the first and the last are always shown
    assert small.bases == [small.policies[0][0]]


class Elements(HTMLParser):
    """The elements of a page, and the texts of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.title, self.inside = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[-1] += text
        elif self.inside == "title":
            self.title += text


def test_text_cannot_become_a_tag(tmp_path):
    run = write_run(tmp_path / "a<b>&'c", prompts=(EVIL, "an animal"))
    data = page.contents(source.read([run]))
    text = page.page(data | {"title": EVIL})
    found = Elements(text)
    assert [attrs.get("type") for tag, attrs in found.tags if tag == "script"] == ["application/json", None]
    assert not any(tag == "img" for tag, _ in found.tags)
    assert found.title.startswith(EVIL)
    embedded = json.loads(found.scripts[0])
    assert embedded["pictures"]["of"][0]["prompt"] == EVIL
    assert embedded["runs"][0]["name"].endswith("a<b>&'c")


def test_the_page_asks_nobody_and_runs_its_own_script_only(data):
    text = page.page(data)
    found = Elements(text)
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [attrs for _, attrs in found.tags if {"src", "href", "srcset"} & attrs.keys()]
    outside = set(re.findall(r"https?://[^\"\\\s]+", text))
    assert outside == {"http://www.w3.org/2000/svg"}  # the name of a namespace, which nobody fetches
    assert "{{" not in text.replace(found.scripts[1], "")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("reward", "https://me:word@host.org/score?key=abc", f"https://host.org/score?{HIDDEN}"),
        ("reward", "0.5 * hps + 2 * http://me@host/x", "0.5 * hps + 2 * http://host/x"),
        ("reward", "/home/me/secret place/mine.py:bright", "mine.py:bright"),
        ("model", "/home/me/models/sd15", "sd15"),
        ("model", "~/models/sd15", "sd15"),
        ("model", r"C:\Users\me\sd15", "sd15"),
        ("model", "OWNER/NAME", "OWNER/NAME"),
        ("prompts", "hub:OWNER/NAME/FILE.csv:text", "hub:OWNER/NAME/FILE.csv:text"),
        ("prompts", "hf_abcdefghijklmn", HIDDEN),
        ("logging.api_key", "abc", HIDDEN),
        ("server.password", "abc", HIDDEN),
        ("correction.block_out_channels", [64, 128], "64, 128"),
        ("algorithm.beta", 1e5, "100000.0"),
        ("lora.start_from", None, ""),
    ],
)
def test_no_secret_and_no_path_of_the_machine_is_shown(name, value, text):
    assert shown(name, value) == text


def test_the_manifest_is_shown_without_host_process_and_paths(workdirs, tmp_path):
    about = manifest.read(workdirs[0])
    given = {"model/unet": {"sha256": "ab" * 32, "file": "/home/me/unet.safetensors", "revision": "1234"}}
    (tmp_path / "run").mkdir()
    replace(about, inputs=given, config=about.config | {"reward": "http://me:pw@host/x"}).write(tmp_path / "run")
    data = page.contents(source.read([tmp_path / "run"]))
    text = json.dumps(data)
    for hidden in ("secret-host", "4711", "/home/me", "me:pw", str(tmp_path)):
        assert hidden not in text
    entries = {entry["name"]: entry["values"] for entry in data["manifest"]}
    assert entries["model/unet"] == ["abababababab · revision 1234"]
    assert entries["jax"] == ["0.10.2"]
    assert data["pictures"] is data["plane"] is None


def test_rows_in_which_runs_differ_are_marked(data):
    differs = {entry["name"] for entry in data["manifest"] if entry["differs"]}
    assert differs == {"seed", "learning_rate"}


@pytest.mark.thorough
def test_the_command_writes_one_file_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (write_run(tmp_path / f"runs/seed{seed}", seed) for seed in (0, 1))
    report.main(["report", str(first)])
    assert capsys.readouterr().out.startswith(f"{first / 'report.html'} (0.1 MB)\n")
    (second / "pictures/00000.png").write_bytes(b"damaged")
    report.main(["report", str(first), str(second)])
    assert "report.html (0.1 MB); 1 saved models have no pictures yet, --draw draws them" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no workdir is given"),
        (("{run}", "{run}/../run"), "is given twice"),
        (("{run}/pictures",), "holds no run: it has no manifest.json"),
        (("{run}/nowhere",), "does not exist"),
        (("{run}", "--out={run}/report.txt"), ".html"),
        (("{run}", "--out={run}"), "it must be a file name that ends in .html"),
        (("{run}", "--draws"), "did you mean --draw?"),
    ],
)
@pytest.mark.thorough
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, said):
    run = write_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        report.main(["report", *(argument.format(run=run) for argument in arguments)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.rglob("*.html"))


def test_names_are_as_long_as_needed(tmp_path):
    paths = [tmp_path / name for name in ("x/run/seed0", "y/run/seed0")]
    assert source.names_of(paths) == ["x/run/seed0", "y/run/seed0"]
    assert source.names_of(paths[:1]) == ["run/seed0"]
    with pytest.raises(UserError, match="given twice"):
        source.names_of([paths[0], paths[0] / "../seed0"])


def test_a_report_that_cannot_be_written_stops_no_run(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    showing = Showing(SimpleNamespace(path=run), PROMPTS)
    images, scores = np.zeros((16, 8, 8, 3), np.float32), {"log_reward": np.zeros(16)}
    showing.keep(10, images, scores)
    showing.end_epoch()
    before = (run / page.NAME).read_bytes()
    assert b"[10," in before
    showing.end_epoch()  # nothing is due
    assert (run / page.NAME).read_bytes() == before

    (run / manifest.NAME).write_text("damaged")
    showing.keep(12, images, scores)
    showing.end_epoch()
    monkeypatch.setattr(showing, "_path", run / manifest.NAME)  # a file, in which no folder can be made
    showing.keep(14, images, scores)
    showing.end_epoch()
    assert (run / page.NAME).read_bytes() == before
    (line,) = capsys.readouterr().err.split("\n", 1)[1].splitlines()
    assert line.startswith(f"the report of {run} is not written (")


def test_an_empty_workdir_has_a_report_too(tmp_path):
    manifest.Manifest(id="0", config={}).write(tmp_path)
    data = page.contents(source.read([tmp_path]))
    assert data["charts"] == []
    page.page(data)
    write_evaluations(tmp_path, updates=(4,))
    write_pictures(tmp_path, updates=(4,))
    data = page.contents(source.read([tmp_path]))
    assert data["pictures"]["bases"] == [None]
    assert len(data["plane"]["points"]) == 1
