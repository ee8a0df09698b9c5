"""The studio's page in a real browser: the whole path on the shipped model, at two widths.

`make check-browser` runs it: it needs `expunge[studio]`, Playwright and a Chromium (`CHROMIUM`, by
default /usr/bin/chromium).
"""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import expunge
from browser import PATIENCE, WIDTHS, choose, erase, launched, need_browser, pages, tab
from expunge import Concept
from expunge.base.files import read_header
from expunge.studio.choice import Choice, write

need_browser()
pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """The command as a user gives it, on a port that is taken; its address and what it printed."""
    environment = {**os.environ, "EXPUNGE_CACHE": str(tmp_path_factory.mktemp("cache"))}
    environment["PYTHONPATH"] = str(Path(expunge.__file__).parents[1])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "expunge", "studio", "--no-browser", "--port", str(port)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines: list[str] = []
        ready = threading.Event()

        def read():
            for line in process.stdout:
                lines.append(line)
                if "Ctrl+C" in line:
                    ready.set()

        threading.Thread(target=read, daemon=True).start()
        assert ready.wait(PATIENCE / 1000), "".join(lines)
    said = next(line for line in lines if "Ctrl+C" in line)
    yield said.split()[2], lines, port
    process.terminate()
    process.wait(30)
    assert not any("Traceback" in line for line in lines), "".join(lines)


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def opened(studio, browser):
    with pages(browser, studio[0]) as open_page:
        yield open_page


def test_the_port_in_use_is_said(studio):
    address, lines, port = studio
    assert f"port {port} is in use" in "".join(lines)
    assert not address.endswith(f":{port}")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_whole_path(opened, width, tmp_path):
    page = opened(width)
    choose(page)
    erase(page)
    assert "airplane → ground" in page.inner_text("#x-title")
    assert page.locator("[data-place]").count() == 8
    page.locator("[data-place='3']").click()
    page.wait_for_function("document.querySelector('.x-sides')?.innerText.includes('aircraft · seed 1')")
    tab(page, "Judge")
    page.click("#x-judge")
    page.wait_for_selector("#x-verdict table")
    assert "no-airplane" in page.inner_text("#x-verdict")
    frame = page.frame_locator("#x-report iframe")
    frame.locator("text=What was erased, and what stayed").wait_for()
    tab(page, "Attack")
    page.fill("#x-budget input[type=number]", "10")
    page.keyboard.press("Tab")
    page.click("#x-attack")
    page.wait_for_selector("#x-rungs section:nth-of-type(4)")
    assert page.locator("#x-rungs section").nth(0).locator(".x-seen").count() == 4
    tab(page, "Take away")
    page.click("#x-form label:has-text('LoRA for diffusers')")
    page.click("#x-take")
    page.wait_for_selector("#x-files a")
    with page.expect_download() as coming:
        page.locator("#x-files a").first.click()
    coming.value.save_as(tmp_path / "lora.safetensors")
    header = read_header(tmp_path / "lora.safetensors")
    assert any("lora" in name for name in header)
    assert "expunge erase uce" in page.inner_text("#x-command")
    with page.expect_download() as coming:
        page.click("#x-save")
    coming.value.save_as(tmp_path / "studio.json")
    data = json.loads((tmp_path / "studio.json").read_text(encoding="utf-8"))
    assert [concept["name"] for concept in data["concepts"]] == ["airplane"]
    assert data["edit"]
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= WIDTHS[width][0]
    other = opened(width)  # somebody else opens it
    assert other.locator("#x-slider img").count() == 0
    other.get_by_test_id("Open …-upload-button").set_input_files(tmp_path / "studio.json")
    other.wait_for_function("document.querySelector('#x-title')?.innerText.includes('airplane')")


def test_by_keyboard_alone(opened):
    page = opened()

    def reach(selector):
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement?.closest({json.dumps(selector)}) !== null"):
                return
        pytest.fail(f"{selector} cannot be reached by keyboard")

    reach("#x-names")
    page.keyboard.type("Jorvek Ambr")
    page.wait_for_function("document.querySelectorAll('ul[role=listbox] li').length === 1")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector(".x-card h3:has-text('Jorvek Ambrask')")
    page.keyboard.press("Escape")
    reach("#x-erase")
    page.keyboard.press("Enter")
    page.wait_for_selector("#x-slider img")
    assert "Jorvek Ambrask" in page.inner_text("#x-title")
    reach("[role=tablist]")
    for name in ("Judge", "Attack", "Take away"):
        page.keyboard.press("ArrowRight")
        page.wait_for_selector(f"[role=tab][aria-selected=true]:has-text('{name}')")
    page.wait_for_selector("#x-form input")
    reach("#x-form")
    page.keyboard.press("ArrowDown")  # from the edit to a LoRA for diffusers
    page.wait_for_selector("#x-form label:has-text('LoRA for diffusers') input:checked")
    page.keyboard.press("Tab")  # the seven forms are one stop
    assert page.evaluate("document.activeElement.id") == "x-take"
    page.keyboard.press("Enter")
    page.wait_for_selector("#x-files tr:has-text('lora') a")


def test_a_browser_that_comes_back_finds_the_work_going_on(opened, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = opened(context=context)
    choose(page, "Cat and dog")
    page.click("#x-erase")
    page.wait_for_selector("#x-progress [role=progressbar]")
    page.reload()
    page.wait_for_selector("#x-slider img")
    assert "cat" in page.inner_text("#x-title")


def test_cancelling_says_so_and_two_people_wait_for_each_other(opened, tmp_path):
    one, other = opened(), opened()
    # A method that trains: one that is done in seconds might be so before the other page looks.
    trained = Choice(concepts=(Concept("cat", "ground"),), method="esd", preset="emoji-object")
    one.get_by_test_id("Open …-upload-button").set_input_files(write(trained, tmp_path / "studio.json"))
    one.wait_for_selector(".x-card h3:has-text('cat')")
    one.wait_for_selector("#x-erase:enabled")
    choose(other)
    one.click("#x-erase")
    one.wait_for_selector("#x-progress [role=progressbar]")
    other.click("#x-erase")
    other.wait_for_selector("#x-progress :text('piece')")
    other.click("#x-cancel")
    other.wait_for_selector("#x-progress :text('cancelled')")
    one.click("#x-cancel")
    one.wait_for_selector("#x-progress :text('cancelled')")
    assert one.locator("#x-slider img").count() == 0
