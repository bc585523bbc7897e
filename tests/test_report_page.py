"""The report in a browser: it opens from the disk, asks nobody, and does what its slider, buttons and keys say."""

import pytest
from browser import Browser, find
from reported import PROMPTS, UPDATES, colour, score, write_run

from nabla_gfn_jax.reports import page

EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)> \"a\" 'b'"
PROGRAM = find()

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome is installed"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The report of one run, and of two; the first prompt of both tries to leave its element."""
    root = tmp_path_factory.mktemp("runs")
    prompts = (EVIL, PROMPTS[1])
    runs = [write_run(root / f"run/seed{seed}", seed, prompts) for seed in (0, 1)]
    page.write(root / "one.html", runs[:1])
    page.write(root / "two.html", runs)
    return root


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    opened = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def browser(running):
    """The browser. After the test nothing may have gone wrong, and nothing but the file and its data was asked for."""
    running.requests.clear()
    running.problems.clear()
    yield running
    assert running.problems == []
    assert running.requests
    assert [url for url in running.requests if not url.startswith(("file://", "data:image/webp"))] == []


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def scores(browser):
    return [float(text.replace("−", "-")) for text in texts(browser, "#pictures .score")]


def gains(browser):
    return [float(text.replace("−", "-")) for text in texts(browser, "#pictures .gain")]


def pixel(browser, tile):
    """The colour of a picture below its white corner."""
    canvas = f"document.querySelectorAll('#pictures canvas')[{tile}]"
    browser.until(f"{canvas}.getContext('2d').getImageData(12, 12, 1, 1).data[3] === 255")
    return browser.run(f"[...{canvas}.getContext('2d').getImageData(12, 12, 1, 1).data].slice(0, 3)")


@pytest.mark.thorough
def test_it_opens_at_the_last_update_and_no_prompt_runs(browser, files):
    browser.open(files / "one.html")
    assert texts(browser, ".bar output") == ["8 updates"]
    assert texts(browser, "#pictures h3") == [EVIL, PROMPTS[1]]
    assert browser.run("document.title") == "run/seed0 · report"
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.querySelectorAll('figure svg path.run').length") > 8
    assert scores(browser) == [pytest.approx(score(8, n, 0), abs=6e-3) for _ in PROMPTS for n in range(8)]
    assert pixel(browser, 9) == pytest.approx(colour(8, 1, 0), abs=12)


def test_the_slider_and_the_keys_move_all_pictures_and_curves(browser, files):
    browser.open(files / "one.html")
    now = "document.querySelector('figure .now').getAttribute('x1')"
    places = [browser.until(now)]
    for updates in (4, 0):
        browser.key("ArrowLeft")
        assert texts(browser, ".bar output") == [f"{updates} updates"]
        assert pixel(browser, 3) == pytest.approx(colour(updates, 3, 0), abs=12)
        places.append(browser.run(now))
    assert float(places[0]) > float(places[1]) > float(places[2])
    browser.key("ArrowLeft")  # there is nothing further to the left
    assert texts(browser, ".bar output") == ["0 updates"]
    browser.run(
        "(s => (s.value = 1, s.dispatchEvent(new Event('input', {bubbles: true}))))(document.getElementById('slider'))"
    )
    assert texts(browser, ".bar output") == ["4 updates"]
    assert pixel(browser, 3) == pytest.approx(colour(4, 3, 0), abs=12)


def test_holding_shows_the_base_model(browser, files):
    browser.open(files / "one.html")
    base, policy = (pytest.approx(colour(n, 5, 0), abs=12) for n in (0, 8))
    assert colour(0, 5, 0)[1] - colour(8, 5, 0)[1] > 24
    browser.mouse("#hold", "mousePressed")
    assert pixel(browser, 5) == base
    shown = texts(browser, "#pictures .gain")
    assert shown[:8] == ["×0.041", "×0.091", "×0.2", "×0.45", "×1", "×2.2", "×5", "×11"]
    browser.mouse("#hold", "mouseReleased")
    assert pixel(browser, 5) == policy
    browser.key("b", up=False)
    assert pixel(browser, 5) == base
    browser.key("b", down=False)
    assert pixel(browser, 5) == policy


def test_sorting_and_strips(browser, files):
    browser.open(files / "one.html")
    before = scores(browser)
    browser.key("s")
    assert scores(browser) == sorted(before, reverse=True) != before
    browser.key("s")
    assert gains(browser) == sorted(gains(browser), reverse=True)
    browser.key("ArrowLeft")
    assert gains(browser) == sorted(gains(browser), reverse=True)
    browser.key("s")  # by chance: the noise with the largest number has become most frequent
    titles = browser.run("[...document.querySelectorAll('#pictures .tile')].map(e => e.title)")
    assert [title[-1] for title in titles] == [str(n) for n in range(7, -1, -1) for _ in PROMPTS]
    browser.key("s")
    assert scores(browser) == [pytest.approx(score(4, n, 0), abs=6e-3) for _ in PROMPTS for n in range(8)]
    browser.key("w")
    assert texts(browser, ".strip > span") == ["worst", "median", "best"]
    shown = scores(browser)
    everything = sorted(score(4, n, 0) for _ in PROMPTS for n in range(8))
    assert len(shown) == 18
    assert shown[:6] == pytest.approx(everything[:6], abs=6e-3)
    assert shown[6:12] == pytest.approx(everything[5:11], abs=6e-3)
    assert shown[12:] == pytest.approx(everything[-6:], abs=6e-3)


def test_a_figure_beside_the_tilted_base_model(browser, files):
    browser.open(files / "two.html")
    figure = "document.getElementById('beside')"
    count = lambda kind: browser.run(f"{figure}.querySelectorAll('circle.{kind}').length")  # noqa: E731
    browser.until(f"{figure}.querySelector('circle.hollow') !== null")
    assert count("hollow") == 2 * 2
    assert "entropy over vendors 0.74 ± 0.015, tilted base model 0.87 ± 0.02" in browser.run(f"{figure}.textContent")
    browser.key("ArrowLeft")
    assert "after 4 updates: log R" in browser.run(f"{figure}.textContent")
    choose = "(s => (s.value = 'fid', s.dispatchEvent(new Event('change', {bubbles: true}))))"
    browser.run(f"{choose}(document.getElementById('figure'))")
    assert count("hollow") == 0
    assert "fid 7 ± 0.5" in browser.run(f"{figure}.textContent")


def test_two_runs_stand_side_by_side(browser, files):
    browser.open(files / "two.html")
    assert browser.run("document.querySelectorAll('#pictures .cell').length") == 2 * 8
    both = browser.run("[...document.querySelectorAll('#pictures .cell')[4].children].map(e => e.title)")
    assert both == [f"{EVIL} · noise 4"] * 2
    assert pixel(browser, 8) == pytest.approx(colour(8, 4, 0), abs=12)
    assert pixel(browser, 9) == pytest.approx(colour(8, 4, 1), abs=12)
    assert browser.run("document.querySelectorAll('figure path.run.thin').length") > 8  # the seeds behind their mean
    browser.mouse("#pictures .tile", "mousePressed", "mouseReleased")
    assert texts(browser, "dialog .film b") == ["base", *map(str, UPDATES[1:])] * 2
    assert "a 0.5" in texts(browser, "dialog .film .score")
    browser.run("document.querySelector('dialog .close').click()")
    browser.until("document.querySelector('dialog') === null")


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_phone_at_night(browser, files, name):
    browser.open(files / f"{name}.html", 390, 844, dark=True, touch=True)
    browser.until("document.querySelector('figure path.run') !== null")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("[...document.querySelectorAll('main *')].every(e => e.getBoundingClientRect().right < 391)")
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    assert browser.run(light) < 150
    browser.key("d")
    assert browser.run(light) > 600
