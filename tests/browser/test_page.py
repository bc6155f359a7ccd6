"""The chat page in headless Chromium, as a visitor uses it: on a fake engine, which the test can hold still.

    apt-get install chromium fonts-noto-cjk fonts-noto-color-emoji
    bash tests/run.sh tests/browser          screenshots lie in $SCREENSHOTS, or in the test's own folder

The answers are of 512 random words, which are up to 5,000 tokens when they come back in the next question: the fake
engine's context holds them.
"""

import os
from pathlib import Path

import pytest
from helpers.chromium import FOUND, Chromium
from helpers.events import until
from helpers.fake_engine import WORDS, fake_generator
from helpers.serving import serving, tokenizer_and_prompts

pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(FOUND is None, reason="needs Chromium: apt-get install chromium fonts-noto-cjk")]
DESKTOP, PHONE = (1280, 800), (390, 844)
CONTROL, SHIFT = 2, 8
ANSWER = "document.querySelector('.turn.assistant:last-of-type .text').textContent"
IDLE = "!document.querySelector('#send').hidden"
BOX = "document.querySelector('#question').value"
CONTEXT = 10_000
# The list of models waits for `go()`; what is asked is kept.
HELD_BACK = """const plain = fetch, list = new Promise((go) => { window.go = go; }); window.asked = [];
    window.fetch = async (address, more) => {
      if (address === 'v1/models') await list; else asked.push(JSON.parse(more.body));
      return plain(address, more);
    };"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tokenizer_and_prompts(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(parts):
    with serving(fake_generator(parts[0], max_length=CONTEXT), parts[1]) as found:
        yield found


@pytest.fixture
def page(tmp_path):
    with Chromium(tmp_path / "profile") as browser:
        yield browser
        assert not browser.faults, browser.faults


@pytest.fixture
def shots(tmp_path):
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ask(page, question):
    page.click("#question")
    page.type(question)
    page.press("Enter", 13)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_question_is_answered_as_it_is_written_and_stopped(server, page, shots, size, dark):
    name = f"{'desktop' if size == DESKTOP else 'phone'}-{'dark' if dark else 'light'}"
    page.open(server.address + "/", *size, dark=dark)
    page.until("document.title === 'tiny'")
    ask(page, "Who are you? \u4f60\u597d \U0001f600")
    page.until(f"{IDLE} && {ANSWER}.length > 50")
    text = page.run(ANSWER)
    assert any(word in text for word in WORDS[3:6]) and "\ufffd" not in text
    assert "<b>" in text or "<b>" not in "".join(WORDS), "what the model writes is text, never markup"
    assert page.run("document.querySelectorAll('main b').length") == 0
    server.engine.max_length = 10**9  # the next answer has no end
    page.run("document.querySelector('[name=max_tokens]').value = ''")
    ask(page, "And again, for ever?")
    page.until("!document.querySelector('#stop').hidden && document.querySelectorAll('.turn.assistant').length === 2")
    page.until(f"{ANSWER}.length > 30")
    server.engine.gate.clear()
    page.screenshot(shots / f"{name}-writing.png")
    assert server.engine.running == 1
    server.engine.gate.set()
    page.click("#stop")
    page.until(IDLE)
    page.until("document.querySelector('.turn:last-child .foot').textContent.includes('stopped')")
    until(lambda: not server.engine.has_work)
    page.screenshot(shots / f"{name}-stopped.png")
    page.click("#settings")
    page.screenshot(shots / f"{name}-settings.png")
    assert page.run("document.documentElement.scrollWidth") <= size[0], "nothing is wider than the window"
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    assert all(address.startswith((server.address, "data:")) for address in page.requests), page.requests


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_with_adapters_there_are_two_models_to_choose(parts, page, shots, size):
    with serving(fake_generator(parts[0], max_length=CONTEXT), parts[1], adapter="tuned-on-sixty-dialogues") as both:
        asked, add = [], both.engine.add
        both.engine.add = lambda name, ids, params: (asked.append(params.adapter), add(name, ids, params))
        page.open(both.address + "/", *size)
        page.until("document.title === 'tuned-on-sixty-dialogues'")
        ask(page, "Who are you?")
        page.until(f"{IDLE} && document.querySelectorAll('.foot').length === 1")
        page.screenshot(shots / f"models-{size[0]}.png")
        assert page.run("document.querySelector('.foot').getBoundingClientRect().bottom <= "
                        "document.querySelector('#ask').getBoundingClientRect().top"), "what stands below is seen"
        page.run("document.querySelector('#models').value = 'tiny'; "
                 "document.querySelector('#models').dispatchEvent(new Event('change'))")
        page.until("document.title === 'tiny'")
        ask(page, "And you?")
        page.until(f"{IDLE} && document.querySelectorAll('.turn.assistant .foot').length === 2")
        page.click("#settings")
        page.click("dialog button[type=submit]")
        page.until("!document.querySelector('dialog').open && document.activeElement.id === 'question'")
        ask(page, "Still you?")
        page.until(f"{IDLE} && document.querySelectorAll('.turn.assistant .foot').length === 3")
        assert asked == [True, False, False] and page.run("document.documentElement.scrollWidth") <= size[0]
        assert page.run("getComputedStyle(document.querySelector('#model')).display") == "none"


def test_keys_the_switch_and_what_is_kept(server, page):
    page.open(server.address + "/")
    page.until("document.title === 'tiny'")
    assert page.run("document.activeElement.id") == "question", "one can type at once"
    page.type("first line")
    page.press("Enter", 13, modifiers=SHIFT)
    assert page.run("document.querySelector('#question').value").startswith("first line")
    page.press("Enter", 13)
    page.until(f"{IDLE} && document.querySelectorAll('.foot').length === 1")
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click(".foot button")
    page.until("window.copied === messages[1].content && window.copied.length > 20")
    page.click(".foot .retry")
    page.until(f"{IDLE} && document.querySelectorAll('.foot').length === 1")
    assert page.run("messages.length") == 2
    page.press("o", 79, modifiers=CONTROL | SHIFT)
    assert page.run("document.querySelectorAll('.turn').length") == 0
    page.press(",", 188, modifiers=CONTROL)
    assert page.run("document.querySelector('dialog').open")
    page.run("document.querySelector('[name=system]').value = 'Be kind.'")
    page.click("dialog button[type=submit]")
    page.click("#theme")
    assert page.run("document.documentElement.dataset.theme") == "dark"
    page.open(server.address + "/")
    page.until("document.title === 'tiny'")
    kept = page.run("[document.documentElement.dataset.theme, document.querySelector('[name=system]').value]")
    assert kept == ["dark", "Be kind."]
    server.engine.gate.clear()
    ask(page, "waiting")
    page.until("document.querySelector('#stop').hidden === false")
    page.press("Escape", 27)
    page.until(IDLE)
    assert page.run(f"[{BOX}, messages.length]") == ["waiting", 0], "no answer had begun: the question comes back"
    server.engine.gate.set()
    page.press("Enter", 13)
    page.until(f"{IDLE} && document.querySelectorAll('.foot').length === 1")
    page.press("Enter", 13)
    assert page.run(f"{IDLE} && messages.length === 2"), "nothing is not sent"


def test_a_new_chat_has_nothing_of_an_answer_that_was_being_written(server, page):
    """What was written would else stand before its first question, which the server refuses."""
    server.engine.max_length = 10**9
    page.open(server.address + "/")
    page.until("document.title === 'tiny'")
    page.run("document.querySelector('[name=max_tokens]').value = ''")
    ask(page, "For ever?")
    page.until(f"{ANSWER}.length > 30")
    page.press("o", 79, modifiers=CONTROL | SHIFT)
    assert page.run(f"{IDLE} && messages.length === 0 && document.querySelectorAll('.turn').length === 0")
    page.run("document.querySelector('[name=max_tokens]').value = '5'")
    ask(page, "And now?")
    page.until(f"{IDLE} && document.querySelectorAll('.foot').length === 1")
    assert page.run("messages.map((one) => one.role)") == ["user", "assistant"]
    assert page.run("document.querySelectorAll('.turn').length") == 2
    until(lambda: not server.engine.has_work, "the first answer goes on")


def test_a_question_before_the_models_are_known(server, page):
    """It waits for the list, can be stopped meanwhile, and is sent once however often Enter is pressed."""
    page.before(HELD_BACK)
    page.open(server.address + "/")
    ask(page, "Already?")
    assert page.run(f"!({IDLE}) && asked.length === 0")
    page.press("Escape", 27)
    page.until(IDLE)
    assert page.run(BOX) == "Already?"
    page.press("Enter", 13)
    page.press("Enter", 13)
    page.run("go()")
    page.until(f"{IDLE} && document.querySelectorAll('.foot').length === 1")
    assert page.run("asked.map((one) => [one.model, one.messages.length])") == [["tiny", 1]]


def test_errors_are_sentences_and_the_question_comes_back(parts, page):
    with serving(fake_generator(parts[0]), parts[1], api_key="k") as server:
        page.open(server.address + "/")
        page.until("document.querySelector('[role=alert]')?.textContent.includes('key is missing or wrong')")
        page.run("document.querySelector('[name=key]').value = 'k'")
        page.click("#settings")
        page.click("dialog button[type=submit]")
        page.until("document.title === 'tiny'")
        ask(page, "word " * 100)
        page.until("document.querySelector('[role=alert]')?.textContent.includes('and the context 64')")
        assert page.run("document.querySelector('#question').value") == "word " * 100
        page.run("document.querySelector('#question').value = ''")
        ask(page, "short")
        page.until(f"{IDLE} && document.querySelectorAll('.foot').length === 1")
        assert page.run("document.querySelectorAll('[role=alert]').length") == 0
    page.faults.clear()  # the browser logs 401 and 400


def test_code_stands_in_boxes(server, page):
    page.open(server.address + "/")
    page.until("document.title === 'tiny'")
    page.run("""(() => { const { place } = addTurn('assistant', ''); window.place = place;
        show(place, 'Look:\\n```python\\nif a < b:\\n    pass\\n```\\nand\\n```\\nunfinished'); })()""")
    assert page.run("[...place.querySelectorAll('pre')].map((one) => one.textContent)") == [
        "if a < b:\n    pass\n", "unfinished"]
    assert page.run("place.textContent") == "Look:\nif a < b:\n    pass\nand\nunfinished"
