"""The page of running runs in headless Chromium: what ends, dies or diverges is shown within two looks.

The page looks every two seconds, so that is within five.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.chromium import FOUND, Chromium
from helpers.watched import RUN, step, write

from megatron_mixtral.training import watch

pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(FOUND is None, reason="needs Chromium: apt-get install chromium fonts-noto-cjk")]
NAMES = ("ends", "dies", "diverges")


def card(name):
    return f"[...document.querySelectorAll('.run')].find(one => one.querySelector('h2 span').textContent === '{name}')"


def state(name):
    return f"{card(name)}.querySelectorAll('h2 span')[1].textContent"


@pytest.fixture
def running(tmp_path):
    """A folder and a living process for each run."""
    found = {}
    for name in NAMES:
        folder = tmp_path / name
        folder.mkdir()
        write(folder, *(step(number, loss=2.0, left=100.0 - number) for number in range(1, 41)))
        found[name] = folder, subprocess.Popen([sys.executable, "-c", RUN, str(folder)], stdin=subprocess.PIPE,
                                               stdout=subprocess.PIPE, text=True)
    for _, process in found.values():
        assert process.stdout.readline() == "held\n"
    yield found
    for _, process in found.values():
        process.kill()
        process.wait()


def looks(page):
    return sum(one.endswith("/runs.json") for one in page.requests)


def test_ends_deaths_and_divergence_are_shown_at_once(running, tmp_path):
    runs = [watch.WatchedRun(folder, name) for name, (folder, _) in running.items()]
    shots = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    with watch.serve(runs, "127.0.0.1", 0) as server, Chromium(tmp_path / "profile") as page:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.open(f"http://127.0.0.1:{server.server_address[1]}/", 1280, 900)
        page.until("document.querySelectorAll('.run').length === 3 && document.querySelectorAll('figure').length === 6")
        assert [page.run(state(name)) for name in NAMES] == ["running"] * 3
        page.screenshot(shots / "watch-running.png")

        folder, process = running["ends"]
        write(folder, step(41, left=0.0))
        process.communicate()
        before = looks(page)
        page.until(f"{state('ends')} === 'finished'")
        assert looks(page) - before <= 2

        running["dies"][1].kill()
        running["dies"][1].wait()
        before = looks(page)
        page.until(f"{state('dies')} === 'died'")
        assert looks(page) - before <= 2

        write(running["diverges"][0], *(step(number, loss=None) for number in range(41, 44)))
        before = looks(page)
        alert = f"{card('diverges')}.querySelector('li')?.textContent"
        page.until(f"{alert}?.startsWith('diverging: 3 of the last 20 steps')")
        assert looks(page) - before <= 2 and page.run(state("diverges")) == "running"
        assert page.run(f"[...{card('diverges')}.querySelectorAll('dd')][1].textContent") == "not finite"
        page.screenshot(shots / "watch-shown.png")
        assert not page.faults, page.faults
        server.shutdown()
        server.server_close()
        page.until("document.querySelector('#lost').textContent.includes('does not answer any more')")
