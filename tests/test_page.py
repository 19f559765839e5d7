"""The page as a person uses it: a headless Chromium against a live server with the demo model.

FINIAL_PICTURES=DIR keeps what was to be seen, at the width of a desktop and of a phone, light and dark.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from brake import Brake
from browser import Browser, Page
from serving import Live, live
from waiting import until

ANSWERED = "document.querySelector('#turns').childElementCount == {} && !document.querySelector('.speaking')"
BEGUN = "document.querySelector('.speaking .prose')?.textContent.length > 0"
LAST = "document.querySelector('.turn:last-child .prose').textContent"
KEY = "a-key-of-the-tests"
DESKTOP, PHONE = (1200, 800), (390, 844)


@pytest.fixture(scope="module")
def brake(tmp_path_factory: pytest.TempPathFactory) -> Brake:
    return Brake(tmp_path_factory.mktemp("brake"))


@pytest.fixture(scope="module")
def server(brake: Brake) -> Iterator[Live]:
    with live("demo", "--threads", "1", before=brake.code) as running:  # the browser wants a core too
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    with live("demo", "--threads", "1", environment={"FINIAL_API_KEY": KEY}) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


def ask(page: Page, text: str, turn: int) -> None:
    page.type(text)
    page.press("Enter")
    page.wait(ANSWERED.format(turn))


@contextlib.contextmanager
def held(server: Live, brake: Brake, steps: int) -> Iterator[None]:
    """Meanwhile the engine makes so many steps and no more: the next answer begins and does not end."""
    brake.hold(server.metric("finial_steps_total") + steps)
    try:
        yield
    finally:
        brake.release()


def set_to(page: Page, **values: object) -> None:
    """Settings as a person enters them: by the keyboard, from field to field."""
    page.click("#open-settings")
    for name, value in values.items():
        page.run(f"(field => {{ field.focus(); field.select(); }})(document.getElementById('{name}'))")
        page.type(str(value))
    page.click("#settings .title button")
    page.wait("!document.querySelector('#settings').open && document.activeElement.id == 'message'")


def pictures(page: Page, name: str) -> None:
    folder = os.environ.get("FINIAL_PICTURES")
    if folder:
        for scheme in ("light", "dark"):
            for width, height in (DESKTOP, PHONE):
                page.resize(width, height, scheme=scheme, scale=2 if width < 600 else 1)
                page.picture(Path(folder) / f"{name}-{width}-{scheme}.png")


def test_a_conversation(server: Live, brake: Brake, browser: Browser) -> None:
    page = browser.open(server.url + "/", width=DESKTOP[0], height=DESKTOP[1])
    pictures(page, "welcome")
    set_to(page, temperature=0, max_tokens=40, system="A street in Rome.")
    ask(page, "Good morrow, sir.", 1)
    system, first = {"role": "system", "content": "A street in Rome."}, {"role": "user", "content": "Good morrow, sir."}
    said = page.run(LAST)
    how = {"temperature": 0, "max_tokens": 40}
    status, reply, _ = server.ask("/v1/chat/completions", {"messages": [system, first], **how})
    assert status == 200 and said.rstrip() == reply["choices"][0]["message"]["content"].rstrip() != ""

    page.type("What news")  # a line of its own by Shift+Enter, and nothing is sent
    page.press("Enter", shift=True)
    ask(page, "of the king?", 2)
    history = [
        system,
        first,
        {"role": "assistant", "content": reply["choices"][0]["message"]["content"]},
        {"role": "user", "content": "What news\nof the king?"},
    ]
    _, reply, _ = server.ask("/v1/chat/completions", {"messages": history, **how})
    assert page.run(LAST).rstrip() == reply["choices"][0]["message"]["content"].rstrip() != ""

    assert page.run("document.querySelector('#status').textContent").strip() == page.run(LAST).strip()  # read aloud
    for turn in range(3, 9):  # an answer of a few words may come in one piece, which has no speed
        with held(server, brake, 4):
            page.type(f"And what then? {turn}")
            page.press("Enter")
            page.wait(f"{BEGUN} || ({ANSWERED.format(turn)})")
        page.wait(ANSWERED.format(turn))
        figures = page.run("document.querySelector('.turn:last-child .figures').innerText")
        if "tok/s" in figures:
            break
    assert "tok/s" in figures and "% of roofline" in figures and "tokens" in figures
    pictures(page, "conversation")
    assert page.problems == [] and page.foreign() == []


def test_a_phone_has_room_for_everything(server: Live, browser: Browser) -> None:
    page = browser.open(server.url + "/", width=PHONE[0], height=PHONE[1])
    page.type("word " * 40 + "x" * 300)
    page.press("Enter")
    page.wait(ANSWERED.format(1))
    for element in ("html", "body", "main", "#turns", ".asked", ".prose"):
        assert page.run(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('{element}'))"), element
    page.click("#open-settings")
    page.wait("document.querySelector('#settings').open")
    box = page.run(
        "(r => [r.left, r.right, r.top, r.bottom])(document.querySelector('#settings').getBoundingClientRect())"
    )
    assert box[0] >= 0 and box[1] <= PHONE[0] and box[2] >= 0 and box[3] <= PHONE[1]
    for field in ("#message", "#send", "#open-settings"):  # large enough for a finger
        assert page.run(f"document.querySelector('{field}').getBoundingClientRect().height") >= 32
    assert page.problems == []


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_in_the_middle(server: Live, brake: Brake, browser: Browser, how: str) -> None:
    page = browser.open(server.url + "/")
    set_to(page, max_tokens=900, temperature=0)
    before = unheard(server)
    with held(server, brake, 6):
        page.type("KING RICHARD III:\nSpeak, and speak on, and never end.")
        page.press("Enter")
        page.wait(BEGUN)
        if how == "Escape":
            page.press("Escape")
        else:
            page.click("#stop")
        page.wait(ANSWERED.format(1))
        assert "stopped" in page.run("document.querySelector('.figures').innerText")
        assert page.run(LAST) != ""
        until(lambda: unheard(server) == before + 1, lambda: "".join(server.lines))
    set_to(page, max_tokens=3)
    ask(page, "And now?", 2)  # the page and the server go on
    assert page.run(LAST) != "" and page.problems == []


def unheard(server: Live) -> int:
    """How many answers were not heard to their end, by the server's log."""
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    # Noted when it is told to end, which may be a step before it does.
    return sum(line["path"] == "/v1/chat/completions" and line.get("finish") in ([None], ["cancel"]) for line in lines)


def test_errors_are_shown_and_the_conversation_goes_on(server: Live, browser: Browser) -> None:
    page = browser.open(server.url + "/")
    set_to(page, max_tokens=20)
    ask(page, "First.", 1)
    set_to(page, max_tokens=5000)  # over the model's context
    ask(page, "Second.", 2)
    shown = page.run("document.querySelector('.turn:last-child [role=alert]').textContent")
    assert shown.startswith("Refused.") and "1024" in shown.replace(",", "")
    pictures(page, "refused")
    set_to(page, max_tokens=20)
    page.click(".turn:last-child .again")
    page.wait(ANSWERED.format(2) + " && !document.querySelector('[role=alert]')")
    assert page.run(LAST) != ""
    assert [p for p in page.problems if "400" not in p] == []  # a browser notes every status over 399 by itself


def test_a_server_that_is_gone(browser: Browser) -> None:
    with live("demo") as running:
        page = browser.open(running.url + "/")
    ask(page, "Is anybody there?", 1)
    shown = page.run("document.querySelector('[role=alert]').textContent")
    assert "cannot be reached" in shown


def test_output_is_text_and_never_markup(server: Live, browser: Browser) -> None:
    page = browser.open(server.url + "/")
    page.run(
        """(async () => {
            const { Prose } = await import("/prose.js");
            const box = document.createElement("div");
            box.id = "probe";
            document.querySelector("#turns").append(box);
            const prose = new Prose(box);
            const lines = ['<img src=x onerror="window.bad = 1">', "", "```", "<script>bad()</script>", "```", "end"];
            for (const sign of lines.join("\\n")) prose.push(sign);
            prose.end();
        })()"""
    )
    assert page.run("[...document.querySelectorAll('#probe *')].map(e => e.tagName).join()") == "P,PRE,P"
    texts = json.loads(page.run("JSON.stringify([...document.querySelectorAll('#probe > *')].map(e => e.textContent))"))
    assert texts == ['<img src=x onerror="window.bad = 1">', "<script>bad()</script>", "end"]
    assert page.run("window.bad") is None
    # And if some markup got in, the policy would not run it.
    assert page.run("(() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true } })()")


def test_thoughts_are_folded_away(server: Live, browser: Browser) -> None:
    """The demo model does not think, so the answer's stream is given to the page in its place."""
    page = browser.open(server.url + "/", width=DESKTOP[0], height=DESKTOP[1])
    deltas = [
        {"reasoning_content": "Who "},
        {"reasoning_content": "goes <b>there</b>?"},
        {"content": "A "},
        {"content": "friend."},
    ]
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.run(f"window.stream = {json.dumps(stream)}")
    page.run(
        """(() => {
            const real = window.fetch;
            window.asked = [];
            window.fetch = async (path, options) => {
                if (path !== "/v1/chat/completions") return real(path, options);
                window.asked.push(options.body);
                return new Response(window.stream, { headers: { "Content-Type": "text/event-stream" } });
            };
        })()"""
    )
    ask(page, "Who is there?", 1)
    fold = "document.querySelector('details.think')"
    assert page.run(f"{fold}.open") is False
    assert page.run(f"{fold}.querySelector('summary').textContent").startswith("Thought for ")
    assert page.run(f"{fold}.querySelector('div').textContent") == "Who goes <b>there</b>?"
    assert page.run("document.querySelector('.turn:last-child > div > .prose').textContent") == "A friend."
    page.click("details.think summary")
    page.wait(f"{fold}.open")
    pictures(page, "thoughts")
    ask(page, "Come in.", 2)
    history = json.loads(page.run("window.asked[1]"))["messages"]
    assert [m["content"] for m in history] == ["Who is there?", "A friend.", "Come in."]  # thoughts are not said again
    assert page.problems == []


def test_a_key_is_asked_for_and_kept_by_the_tab_alone(locked: Live, browser: Browser) -> None:
    page = browser.open(locked.url + "/", password=KEY)
    ask(page, "Good morrow.", 1)
    assert page.run(LAST) != ""
    set_to(page, key="a-wrong-key-here")
    ask(page, "And again?", 2)
    assert "Not allowed." in page.run("document.querySelector('[role=alert]').textContent")
    set_to(page, key=KEY)
    page.click(".again")
    page.wait(ANSWERED.format(2) + " && !document.querySelector('[role=alert]')")
    assert KEY in page.run("JSON.stringify({...sessionStorage})")
    assert KEY not in page.run("JSON.stringify({...localStorage})")


def test_headers_of_the_page(server: Live) -> None:
    for path in ("/", "/style.css", "/app.js", "/icon.svg"):
        status, _, headers = server.ask(path)
        assert status == 200
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert server.ask(path, headers={"If-None-Match": headers["etag"]})[0] == 304
    assert server.ask("/page/app.js")[0] == 404 and server.ask("/../service.py")[0] == 404
