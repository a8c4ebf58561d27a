"""The built-in page in a real browser; screenshots go to ATOM_SCREENSHOTS, if that names a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from atom.serving.server import AppOptions

from .browser import MISSING, Browser, browser
from .scripted import ScriptedRunner, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=f"{MISSING} is not installed (apt-get install chromium-driver)"),
]

ENTER = "\ue007"
LAST = "[...document.querySelectorAll('.say')].at(-1)"
ANSWER = "<b>Low-bit</b> numbers: é 😀, " + "and so on, " * 6 + "done."
SCREENSHOTS = os.environ.get("ATOM_SCREENSHOTS")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as made:
        yield made


def shoot(chromium: Browser, name: str) -> None:
    if SCREENSHOTS:
        chromium.screenshot(Path(SCREENSHOTS) / f"{name}.png")


def test_load_and_chat(chromium: Browser) -> None:
    runner = ScriptedRunner(lambda request, index: ANSWER, pause_s=0.04 if SCREENSHOTS else 0.01)
    with running(runner) as server:
        chromium.open(server.url)
        chromium.wait("document.querySelector('#state').innerText === 'serving'")
        assert chromium.text("#model") == "tiny"
        chromium.keys("#text", f"What is Atom?{ENTER}")
        chromium.wait("document.querySelector('#send').innerText === 'Stop'")
        chromium.wait("document.querySelector('.value').innerText === '1'")
        chromium.wait("document.querySelector('#send').innerText === 'Send'", 20)
        assert chromium.run(f"return {LAST}.innerText") == ANSWER, "shown as text, markup included"
        assert "tokens/s" in chromium.text(".said") and "first token after" in chromium.text(".said")
        chromium.wait("Number(document.querySelectorAll('.value')[2].innerText) > 0", 5)
        chromium.wait("document.querySelectorAll('.value')[4].innerText.endsWith('ms')", 5)
        chromium.wait("document.querySelector('#totals').innerText.startsWith('Sequences ended: 1')", 5)
        shoot(chromium, "light")
        chromium.keys("#text", f"And then?{ENTER}")
        chromium.wait("document.querySelectorAll('.said').length === 2", 20)
        assert len(server.runner.seen[-1].prompt_token_ids) > 2 * len(server.runner.seen[0].prompt_token_ids), "history"
        chromium.media("dark")
        shoot(chromium, "dark")
        chromium.media("light")
        chromium.resize(420, 900)
        assert chromium.run("return document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
        shoot(chromium, "narrow")
        chromium.resize(1280, 860)
        assert chromium.errors() == []


def test_stop_aborts_the_request(chromium: Browser) -> None:
    runner = ScriptedRunner(lambda request, index: "word " * 180, pause_s=0.02)
    with running(runner) as server:
        chromium.open(server.url)
        chromium.keys("#text", f"Go on.{ENTER}")
        chromium.wait(f"{LAST} && {LAST}.innerText.length > 10")
        chromium.click("#send")
        server.wait_idle()
        assert "stopped" in chromium.wait(
            "document.querySelector('.said') && document.querySelector('.said').innerText"
        )
        assert server.engine.stats().num_output_tokens < 600
        chromium.click("#clear")
        assert chromium.run("return document.querySelectorAll('.say').length") == 0


def test_errors_are_shown(chromium: Browser) -> None:
    with running() as server:
        chromium.open(server.url)
        chromium.run("document.querySelector('#tokens').value = 100000")
        chromium.keys("#text", f"Go on.{ENTER}")
        assert "max_tokens must be at most" in chromium.wait("document.querySelector('.error')?.innerText")
        shoot(chromium, "error")


def test_it_asks_for_the_key(chromium: Browser) -> None:
    with running(options=AppOptions(api_keys=("secret",))) as server:
        assert server.http.get("/").status_code == 401
        chromium.open(server.url)
        chromium.wait("document.querySelector('#ask-key').open")
        shoot(chromium, "key")
        chromium.keys("#key-text", f"wrong{ENTER}")
        assert "does not know" in chromium.wait("document.querySelector('#key-error').innerText")
        chromium.keys("#key-text", f"secret{ENTER}")
        chromium.wait("document.querySelector('#state').innerText === 'serving'")
        chromium.keys("#text", f"Hello?{ENTER}")
        chromium.wait(f"{LAST} && {LAST}.innerText === 'Hello there.'")


def test_every_control_has_a_name(chromium: Browser) -> None:
    with running() as server:
        chromium.open(server.url)
        nameless = chromium.run(
            "return [...document.querySelectorAll('button, input, textarea')]"
            ".filter(e => !(e.innerText.trim() || [...(e.labels || [])].some(l => l.textContent.trim())))"
            ".map(e => e.outerHTML)"
        )
        assert nameless == []
