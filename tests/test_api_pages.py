"""The pages of the API: they are built and read without a network, and every public name is on them."""

import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import Browser, find

from nabla_gfn_jax import api

pytestmark = pytest.mark.thorough

BUILD = Path(__file__).parents[1] / "docs/site/build.py"
WITHOUT_NETWORK = """
import runpy, socket, sys

def refuse(*args, **kwargs):
    raise OSError("a connection was asked for")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-c", WITHOUT_NETWORK, str(BUILD), str(folder)], check=True, timeout=500)
    return folder


def test_every_public_name_is_there_with_its_docstring(site):
    page = (site / "nabla_gfn_jax/api.html").read_text(encoding="utf-8")
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())
    for name in api.__all__:
        assert f'<section id="{name}">' in page
        first, _, _ = " ".join(getattr(api, name).__doc__.replace("`", "").split()).partition(". ")
        assert first in text, name


class Targets(HTMLParser):
    """What a page links to or loads, and the ids that links may lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("href", "src", "srcset", "data", "action"):
                self.loads.append(value)


def test_no_link_is_broken_and_no_page_loads_from_elsewhere(site):
    pages = {file: Targets(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    assert len(pages) > 5
    inner = 0
    for file, page in pages.items():
        assert [what for what in page.loads if not what.startswith("data:")] == []
        for link in page.links:
            scheme, _, path, _, fragment = urlsplit(link)
            if scheme:
                assert link == "https://pdoc.dev"
                continue
            found = pages[(file.parent / path).resolve() if path else file]
            assert not fragment or fragment in found.ids, f"{file.name} links to {link}"
            inner += 1
    assert inner > 100


@pytest.mark.skipif(find() is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_and_searches_them_and_asks_nobody(site, tmp_path):
    browser = Browser(find(), tmp_path)
    try:
        browser.open(site / "index.html")
        assert browser.run("document.querySelector('main h1').textContent") == "From Python"
        browser.run("document.querySelector('input[type=search]').focus()")
        for key in "finetune":
            browser.key(key)
        browser.until("document.querySelectorAll('.search-result').length > 0")
        assert "api.finetune" in browser.run("document.querySelector('.search-result').textContent.replace(/\\s/g, '')")
        browser.open(site / "nabla_gfn_jax/api.html")
        assert browser.run("document.querySelectorAll('main section > .attr.function').length") == len(api.__all__)
        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith(("file://", "data:"))] == []
        assert browser.requests
    finally:
        browser.close()
