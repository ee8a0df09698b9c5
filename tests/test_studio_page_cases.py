"""The studio's page, case by case: bad input, other models, strength (`make check-browser`).

The server is in the test's own process; what cannot be had from outside (too little memory, a full disk,
a hub) is set there.
"""

import errno
import json
import logging
import pickle
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from browser import PATIENCE, choose, erase, launched, need_browser, pages, tab, toast
from expunge.studio import server
from expunge.studio.house import Studio
from expunge.studio.jobs import Job

need_browser()
pytestmark = [pytest.mark.slow, pytest.mark.browser]

LARGEST = 3_000_000
"""Bytes of an upload that the page takes here: the test need not write a gigabyte."""


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    house = Studio(tmp_path_factory.mktemp("studio"), first="emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "LARGEST_UPLOAD", LARGEST)
        patch.setenv("GRADIO_TEMP_DIR", str(house.folder / "served"))
        port = server.free_port("127.0.0.1", 17860)
        app = server.start("127.0.0.1", port, house)
        house.address = f"http://127.0.0.1:{port}"
        yield house
        house.desk.close()
        app.close()


@pytest.fixture(scope="module")
def browser(studio):  # the server first: a browser's loop would be in its way
    with launched() as browser:
        yield browser


@pytest.fixture
def opened(studio, browser, caplog):
    with pages(browser, studio.address) as open_page:
        yield open_page
    unforeseen = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in unforeseen] == []


def newest(studio):
    """The session of the page that was opened last."""
    return list(studio._sessions.values())[-1]


def files(folder, tiny):
    """Files that nobody should give to the page; by name."""
    for name, content in (
        ("model.ckpt", pickle.dumps({})),
        ("renamed.txt", pickle.dumps({})),
        ("list.exe", b"MZ"),
        ("empty.txt", b""),
        ("kind.txt", b"cat=ground, objct"),
        ("column.csv", b"nam\ncat\n"),
        ("binary.txt", b"\xff\xfe\xfa"),
        ("broken.toml", b"[[concept]\n"),
        ("large.csv", b"name\n" + b"cat\n" * 300_000),
        ("larger.json", b" " * (LARGEST + 1)),
        ("not.json", b"{"),
        ("other.json", b"[1, 2]"),
        ("newer.json", json.dumps({"format": 99, "concepts": []}).encode()),
        ("pickled.safetensors", pickle.dumps({})),
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
    ):
        (folder / name).write_bytes(content)
    save_file({"a": torch.zeros(2)}, folder / "weights.safetensors")
    (folder / "empty").mkdir()
    return {**{path.name: path for path in folder.iterdir()}, "tiny": tiny}


LISTS = {
    "model.ckpt": "pickled",
    "renamed.txt": "pickled",
    "list.exe": "none of the files that are read here: .txt, .csv",
    "empty.txt": "is empty",
    "kind.txt": "did you mean 'object'",
    "column.csv": "column",
    "binary.txt": "UTF-8",
    "broken.toml": "broken.toml",
    "large.csv": "a .csv file may have",
    "larger.json": "maximum allowed size",
}
PASTED = {
    "cat\nCat": "on line 1",
    " ": "the list is empty",
    "cat=cat": "the concept itself",
}
MODELS = {
    "emojj": "did you mean 'emoji'",
    "": "name a model",
    "model.ckpt": "pickled",
    "empty": "no model",
    "weights.safetensors": "weights.safetensors",
    "tiny": "can be used here",
    "nobody/nothing": "nobody/nothing",
}
OPENED = {
    "not.json": "not JSON",
    "other.json": "no session of the studio",
    "newer.json": "newer expunge",
    "pickled.safetensors": "pickled",
    "cut.safetensors": "not a whole safetensors",
    "weights.safetensors": "edit",
    "model.ckpt": "pickled",
}


def test_bad_inputs_are_answered_in_a_sentence_and_nothing_is_lost(
    opened, studio, tmp_path, folder, monkeypatch
):
    there = files(tmp_path, folder)
    page = opened()
    choose(page)
    erase(page)
    session = newest(studio)
    told = {}

    def expect(name, part, said):
        """Keep what the page said; what was chosen and made must be as it was."""
        told[name] = said
        print(f"{name}: {said}")
        assert part.lower() in said.lower(), f"{name}: {said}"
        assert "\n" not in said.strip(), name
        assert str(studio.folder) not in said, name
        assert [concept.name for concept in session.choice.concepts] == ["airplane"], name
        assert session.choice.model == "emoji", name
        assert session.made is not None, name

    page.click("text=A list, pasted or as a file")
    for name, part in LISTS.items():
        page.locator("#x-list input[type=file]").set_input_files(there[name])
        expect(f"the list {name}", part, toast(page))
        # The box is ready for a mended list, with nothing to clear.
        page.wait_for_selector("#x-list input[type=file]", state="attached")
        page.wait_for_function("!document.querySelector(`#x-list [aria-label='Clear']`)")
    for text, part in PASTED.items():
        page.fill("#x-text textarea", text)
        page.click("text=Take this list")
        expect(f"the text {text!r}", part, toast(page))
    page.click("text=Another model")
    monkeypatch.setattr(studio.models, "memory", lambda: 1000.0)
    for name, part in MODELS.items():
        page.fill("#x-model input, #x-model textarea", str(there.get(name, name)))
        page.click("text=Use this model")
        expect(f"the model {name!r}", part, toast(page))
        page.wait_for_function(
            "document.querySelector('#x-model :is(input, textarea)').value === 'emoji'"
        )
    assert studio.models.ready(str(folder)) is None
    for name, part in OPENED.items():
        page.get_by_test_id("Open …-upload-button").set_input_files(there[name])
        expect(f"opening {name}", part, toast(page))

    page.click("#x-stay input")
    page.keyboard.type("airplane")
    page.keyboard.press("Enter")
    expect("airplane kept, too", "both erased and retained", toast(page))
    page.keyboard.press("Escape")
    page.fill("#x-seed input", "-1")
    page.keyboard.press("Tab")
    expect("the seed -1", "minimum value 0", toast(page))
    page.fill("#x-seed input", "0")
    page.keyboard.press("Tab")

    page.fill("#x-prompts textarea", " ")
    page.click("#x-draw")
    expect("no prompt", "at least one prompt", toast(page))
    page.fill("#x-prompts textarea", "\n".join(f"a cat {n}" for n in range(80)))
    page.click("#x-draw")
    expect("80 prompts", "more than the 64", toast(page))
    tab(page, "Attack")
    # The form is filled in when the tab is shown for the first time: not before that is it emptied.
    page.wait_for_function("document.querySelector('#x-target textarea')?.value")
    page.fill("#x-target textarea", "")
    page.click("#x-attack")
    expect("an attack on nothing", "write the prompt", toast(page))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    tab(page, "Take away")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full)
        page.click("#x-take")
        said = page.wait_for_selector("#x-doing [role=alert]").inner_text()
        expect("no disk", "No space left", said)
    page.click("#x-take")
    page.wait_for_selector("#x-files a")
    assert len(told) >= 25
    assert page.locator("text=Traceback").count() == 0


NAMES = {
    "飞机": "no word in the script of “飞机”",
    "airplne": "did you mean “airplane”",
    "zzyzx": "can only spell “zzyzx”",
    "cat " * 90: "this model reads no more than",
    "<img src=x onerror=alert(1)>": "can only spell “img”",
}


def test_a_name_that_the_model_does_not_know_is_said_beside_it(opened):
    page = opened()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    for name, part in NAMES.items():
        page.click("#x-names input")
        page.keyboard.insert_text(name)
        page.keyboard.press("Enter")
        page.wait_for_function(
            "part => document.querySelector('#x-foresight')?.innerText.includes(part)", arg=part
        )
        # The card comes after the foresight; a name that is taken back before comes again with it.
        page.wait_for_selector(".x-card")
        page.keyboard.press("Backspace")
        page.wait_for_function("!document.querySelector('.x-card')")
    assert page.locator("#x-erase").is_disabled()


def test_the_queue_says_its_place_and_a_reload_goes_on(opened, studio):
    """Work of another session is at hand; the page waits, says so, and is found again by a reload."""
    go = threading.Event()
    blocked = studio.desk.submit(Job("another", "Erasing", lambda job: go.wait(60)))
    page = opened()
    choose(page)
    page.click("#x-erase")
    page.wait_for_selector("#x-progress :text('waiting, 1 piece of work before yours')")
    page.reload()
    page.wait_for_selector("#x-progress :text('waiting, 1 piece of work before yours')")
    go.set()
    page.wait_for_selector("#x-slider img")
    assert blocked.wait(10)


def test_a_disk_that_fills_while_it_erases_is_said_and_the_work_is_kept(opened, studio, monkeypatch):
    page = opened()
    choose(page)
    session = newest(studio)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full)
        page.click("#x-erase")
        said = page.wait_for_selector("#x-progress [role=alert]").inner_text()
    assert "No space left" in said
    assert session.made is None
    assert not session.edit_path.exists()
    erase(page)
    assert session.made is not None


def until(page, session, true):
    """Wait for what the session knows and the page may not show yet."""
    last = time.monotonic() + PATIENCE / 1000
    while not true():
        if time.monotonic() > last:
            said = page.locator("#x-progress, [data-testid=toast-text]").all_inner_texts()
            pytest.fail(
                f"in vain: {session.job} {session.choice} {session.foresee()}, and on the page {said}"
            )
        page.wait_for_timeout(100)


def use(page, session, model, config=""):
    """Take another model, and wait until the session has it."""
    if not page.locator("#x-model input, #x-model textarea").first.is_visible():
        page.click("text=Another model")
    page.fill("#x-model input, #x-model textarea", model)
    page.fill("#x-config :is(input, textarea)", config)
    page.click("text=Use this model")
    until(page, session, lambda: session.choice.model == model)
    page.wait_for_function("!document.querySelector('.x-card')")
    page.wait_for_function("!document.querySelector('#x-progress [role=progressbar]')")


def test_a_single_file_and_a_model_of_the_hub(opened, studio, single, folder, on_hub):
    page = opened()
    session = newest(studio)
    for model, config in ((str(single), str(folder)), ("owner/name", "")):
        use(page, session, model, config)
        assert session.choice.model == model
        page.click("#x-names input")
        page.keyboard.insert_text("airplane")
        page.keyboard.press("Enter")
        page.wait_for_selector(".x-card h3:has-text('airplane')")
        page.keyboard.press("Escape")
        page.wait_for_selector("#x-erase:enabled")
        page.click("#x-erase")
        until(page, session, lambda: session.made is not None and session.made.model == model)  # noqa: B023
        page.wait_for_selector("#x-slider img")
        assert session.made.model == model
        assert session.made.edit.record.problem.erase[0].name == "airplane"


def same(page, place):
    """Whether a pair's two images are the same."""
    return page.evaluate(
        "place => { const [a, b] = document.querySelectorAll(`[data-place='${place}'] img`);"
        " return a.src === b.src; }",
        place,
    )


def test_the_slider_of_strength_draws_again(opened):
    page = opened()
    choose(page)
    erase(page)
    page.wait_for_selector("[data-place='0']")
    assert not same(page, 0)
    page.locator("#x-strength input[type=range]").click(position={"x": 2, "y": 2})
    page.wait_for_function(
        "[...document.querySelectorAll('[data-place]')].every("
        "one => one.children[0].src === one.children[1].src)"
    )
    assert page.locator("#x-strength input[type=number]").input_value() == "0"


def test_what_else_will_move_is_said_before_it_is_erased(opened, studio):
    page = opened()
    choose(page)
    page.wait_for_selector(".x-moves li")
    session = newest(studio)
    found = session.foresee().forecast
    assert session.made is None
    assert page.locator(".x-moves li span").first.inner_text() == found.moves[0].name
    page.locator("#x-stay input").click()
    page.keyboard.insert_text("a red house")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "[...document.querySelectorAll('.x-moves span')].some(one => one.textContent === 'a red house')"
    )


def test_a_key_that_adds_no_name_is_not_answered(studio):
    """An answer that came after Enter, with the names as they were before, would take a name away."""
    from expunge.studio.handlers import Handlers, gr

    do, answered = Handlers(studio), []
    session = studio.session()
    session.choose(["airplane"])
    typed = do.typing(lambda who, names: answered.append(names) or ["set"], lambda _: ["airplane"], 1)
    for key, names, wanted in (
        ("g", ["airplane"], []),
        ("Enter", ["airplane", "Van Gogh"], [["airplane", "Van Gogh"]]),
        ("g", ["cat"], []),
        ("Backspace", [], [[]]),
    ):
        answered.clear()
        said = typed(session.name, names, SimpleNamespace(key=key))
        assert answered == wanted
        assert (said == [gr.skip()]) is (not wanted)
