"""The notebooks in a real JupyterLab in a real browser: run, slide, play, click.

.ci/matrix runs the same in Notebook 7 (BROWSER_FRONT_END=notebook)."""
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb"))
FRONT_END = os.environ.get("BROWSER_FRONT_END", "lab")  # or "notebook"
ADDRESS = {"lab": "lab/tree", "notebook": "notebooks"}[FRONT_END]
CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
         "--disable-background-networking --disable-component-update --disable-sync").split()
MINUTES = 14  # for one notebook on a slow machine; one minute is usual
IN_SIGHT = 720  # pixels for picture and slider together, as on a projector
HELD = 40     # key strokes of a held key
SETTINGS = {
    # Lab puts off-screen cells to sleep, and older ones take them out of the page.
    # We count every slider and read every picture, so all cells must be there.
    "notebook-extension/tracker": {"windowingMode": "none"},
    # No question about news, no look at a web site for updates.
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
# Errors that a healthy front end writes to the console by itself, and why. Ours are all others.
NOT_OURS = (
    # A picture attached to a cell is asked for once by its name, then put in.
    r"Failed to load resource: net::ERR_UNKNOWN_URL_SCHEME attachment:[\w.-]+",
    # Notebook 7.6 asks for a settings schema that it does not ship, before any notebook.
    r"Cannot read properties of undefined \(reading 'schema'\)")
CONTROLS = ".slider, .widget-dropdown, .widget-button, .widget-toggle-button, .widget-checkbox"

# Read and time the page from inside. A box is one .frames element, a panel one output
# that holds ipywidgets.
HELPERS = """
window.our = {
  boxes: () => [...jupyterapp.shell.currentWidget.node.querySelectorAll(
    '.jp-OutputArea-output .frames')],
  shown: box => [...box.querySelectorAll('img')].filter(image =>
    image.checkVisibility({opacityProperty: true, visibilityProperty: true})
    && image.complete && image.naturalWidth > 0 && image.clientHeight > 0),
  look: box => { const shown = our.shown(box), all = [...box.querySelectorAll('img')];
    return {frame: all.indexOf(shown[0]), count: shown.length, picture: shown[0]?.src,
            text: box.querySelector('output').textContent,
            value: +box.querySelector('input').value,
            max: +box.querySelector('input').max}; },
  cells: () => jupyterapp.shell.currentWidget.content.widgets
    .filter(cell => cell.model.type === 'code'),
  kernel: () => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel,
  ready: () => our.kernel()?.status === 'idle' && our.kernel().connectionStatus === 'connected'
    && jupyterapp.shell.currentWidget.content.widgets.length > 1,
  run: () => { our.done = false; jupyterapp.commands.execute('notebook:run-all-cells')
    .finally(() => { our.done = true; }); },
  finished: () => our.done && our.kernel().status === 'idle',
  // Note what each paint shows until stopped.
  watch: box => { const seen = []; let going = true;
    const note = () => { if (!going) return; seen.push(our.look(box));
      requestAnimationFrame(note); };
    note();
    our.stop = () => { going = false; return seen; }; },
  // Note the milliseconds from each key until the frame that shows the change is painted: a
  // message sent before the paint is delivered after it.
  time: box => { const times = []; let frame = our.look(box).frame;
    const down = event => requestAnimationFrame(function wait() {
      const now = our.look(box).frame;
      if (now === frame) { requestAnimationFrame(wait); return; }
      frame = now;
      const channel = new MessageChannel();
      channel.port1.onmessage = () => times.push(performance.now() - event.timeStamp);
      channel.port2.postMessage(0); });
    document.addEventListener('keydown', down, true);
    our.stop = () => { document.removeEventListener('keydown', down, true); return times; }; },
  // The bytes of all visible pictures of a panel, as one text.
  pictures: async panel => { const all = our.shown(panel);
    const bytes = await Promise.all(all.map(async image => {
      const data = await (await fetch(image.src)).arrayBuffer();
      return [...new Uint8Array(await crypto.subtle.digest('SHA-256', data))].join(); }));
    return bytes.join('|'); },
};
"""


def need_browser() -> str:
    """The browser's path; without one, fail in CI and skip elsewhere."""
    if CHROMIUM is None:
        sentence = "no Chromium found: install the apt package chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(sentence)
    return CHROMIUM


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Jupyter server over a copy of the repository: its address, with the token."""
    need_browser()
    home = tmp_path_factory.mktemp("browser")
    shutil.copytree(ROOT, home / "repo", ignore=shutil.ignore_patterns(
        ".*", "runs", "venv", "tests", "__pycache__", "*-ubyte"))
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind)
               for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
                "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    port, token = free_port(), os.urandom(16).hex()
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", FRONT_END, "--no-browser", "--allow-root",
             "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
             f"--IdentityProvider.token={token}"],
            cwd=home / "repo", stdout=log, stderr=log,
            env={**os.environ, **folders, "DIFFUSION_PROFILE": "smoke"})
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, token, process, home / "log")
        yield lambda notebook: f"{address}/{ADDRESS}/{notebook}?reset&token={token}"
    finally:
        process.terminate()  # it stops its kernels first
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(address: str, token: str, process: subprocess.Popen, log: Path) -> None:
    """Return when the server answers; fail with its log if it does not in a minute."""
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    pytest.fail(f"the Jupyter server does not answer:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    path = need_browser()
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Opened:
    """A notebook in the browser: its page as it was opened, then run from top to bottom."""

    def __init__(self, browser, address: str) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(
            f"{line.text} {line.location.get('url', '')}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.add_init_script(HELPERS)
        self.page.goto(address, timeout=200_000)
        self.page.wait_for_function("our.ready()", timeout=200_000)
        self.node = self.page.evaluate_handle("jupyterapp.shell.currentWidget.node")
        self.as_opened = self.page.evaluate("our.boxes().map(our.look)")
        self.page.evaluate("our.run()")
        self.page.wait_for_function("our.finished()", timeout=MINUTES * 60_000, polling=500)
        self.cells = self.page.evaluate(
            "our.cells().map(cell => ({id: cell.model.id, count: cell.model.executionCount,"
            " outputs: cell.model.outputs.toJSON()}))")

    def boxes(self) -> list["Box"]:
        """Every frame slider."""
        return [Box(self.page, box) for box in
                self.node.query_selector_all(".jp-OutputArea-output .frames")]

    def panels(self) -> list:
        """Every output that holds ipywidgets."""
        return [output for output in self.node.query_selector_all(".jp-OutputArea-output")
                if output.query_selector(".jupyter-widgets")]


class Box:
    """One frame slider in the page."""

    def __init__(self, page, box) -> None:
        self.page, self.box = page, box
        self.slider = box.query_selector("input[type=range]")
        self.name = self.slider.get_attribute("aria-label")
        self.slider.scroll_into_view_if_needed()

    def look(self) -> dict:
        """The frame that is shown: its number among the images, picture, text, value."""
        return self.page.evaluate("box => our.look(box)", self.box)

    def until(self, condition: str, **arguments) -> dict:
        """Wait until a condition on now (in JavaScript) holds, and look."""
        self.page.wait_for_function(
            f"([box, {{{', '.join(arguments)}}}]) => {{ const now = our.look(box);"
            f" return {condition}; }}", arg=[self.box, arguments], timeout=30_000)
        return self.look()

    def key(self, name: str, value: int) -> dict:
        """Press a key on the slider; wait for the value that it must lead to."""
        self.slider.focus()
        self.page.keyboard.press(name)
        return self.until("now.value === value", value=value)

    def home(self) -> dict:
        """Focus the slider and go to its first frame."""
        self.slider.focus()
        self.page.keyboard.press("Home")
        return self.until("now.value === 0")

    def walk(self) -> list[dict]:
        """All frames by the right arrow, first to last."""
        seen = [self.home()]
        while seen[-1]["value"] < seen[0]["max"]:
            seen.append(self.key("ArrowRight", seen[-1]["value"] + 1))
        return seen


@pytest.fixture(scope="module", params=NOTEBOOKS)
def opened(request, server, browser):
    """Each notebook in turn, run in the browser once for all tests."""
    notebook = Opened(browser, server(request.param))
    yield notebook
    notebook.page.evaluate("our.kernel().shutdown()")
    notebook.page.close()


def different(looks: list[dict]) -> bool:
    """True if one frame is shown at a time, and all pictures and texts are different."""
    return all(look["count"] == 1 for look in looks) and all(
        len({look[what] for look in looks}) == len(looks)
        for what in ("frame", "picture", "text"))


def test_every_cell_runs_without_error(opened):
    for number, cell in enumerate(opened.cells, 1):
        assert not [out for out in cell["outputs"] if out["output_type"] == "error"], cell
        assert cell["count"] == number, cell["id"]


def test_opened_untrusted_each_slider_shows_its_first_frame(opened):
    assert opened.as_opened
    for look in opened.as_opened:
        assert (look["count"], look["frame"]) == (1, 0) and look["text"]


def test_every_frame_slider_stands_in_sight_of_its_picture(opened):
    for box in opened.boxes():
        assert box.box.bounding_box()["height"] <= IN_SIGHT, box.name


def test_every_frame_slider_follows_the_keys(opened):
    assert opened.boxes()
    for box in opened.boxes():
        seen = box.walk()
        assert different(seen), box.name
        last = box.look()["max"]
        assert box.key("Home", 0) == seen[0]
        assert box.key("End", last) == seen[-1]
        assert box.key("ArrowLeft", last - 1) == seen[-2]


def test_every_frame_slider_follows_the_mouse(opened):
    for box in opened.boxes():
        looks, place = [box.home()], box.slider.bounding_box()
        middle = place["y"] + place["height"] / 2
        opened.page.mouse.click(place["x"] + 0.55 * place["width"], middle)
        looks.append(box.until("now.value > 0"))
        opened.page.mouse.down()
        opened.page.mouse.move(place["x"] + 2, middle, steps=4)
        assert box.until("now.value === 0") == looks[0], box.name
        opened.page.mouse.move(place["x"] + place["width"] - 2, middle, steps=4)
        opened.page.mouse.up()
        last = box.until("now.value === now.max")
        assert different(looks) and different([looks[0], last]), box.name


def test_play_moves_and_pause_stops(opened):
    for box in opened.boxes():
        button, walk, first = box.box.query_selector("button"), box.walk(), box.home()
        word = button.text_content()
        opened.page.evaluate("box => our.watch(box)", box.box)
        if first["max"] > 6:  # some sliders are short under smoke
            button.click()
            box.until("now.value >= 2")
            assert button.text_content() != word, box.name
            button.click()
            assert_still(box, word)
        box.key("End", first["max"])
        button.click()  # plays again from the first frame
        box.until("now.value < now.max")
        box.until("now.value === now.max")  # and stops by itself at the last
        opened.page.wait_for_timeout(300)
        assert_still(box, word)
        paints = opened.page.evaluate("our.stop()")
        assert all(paint == walk[paint["value"]] for paint in paints), box.name
        assert [paint["frame"] for paint in paints].count(first["frame"]) > 1


def assert_still(box: Box, word: str) -> None:
    """The box has stopped playing; its button says so by its word."""
    look = box.look()
    box.page.wait_for_timeout(300)
    assert box.look() == look, f"{box.name}: still moves"
    assert box.box.query_selector("button").text_content() == word, box.name


def held(box: Box, walk: list[dict]) -> tuple[list[int], list[dict]]:
    """The frames that a held key must show, to and fro, and what each paint showed."""
    box.home()
    box.page.evaluate("box => our.watch(box)", box.box)
    frames, key = [walk[0]["frame"]], "ArrowRight"
    value, step = 0, 1
    for _ in range(HELD):
        if not 0 <= value + step < len(walk):
            box.page.keyboard.up(key)
            step, key = -step, "ArrowLeft" if step == 1 else "ArrowRight"
        box.page.keyboard.down(key)  # from the second on as a key that is held repeats
        value += step
        frames.append(walk[value]["frame"])
        box.page.wait_for_timeout(33)
    box.page.keyboard.up(key)
    box.page.wait_for_timeout(100)
    return frames, box.page.evaluate("our.stop()")


def test_a_held_key_shows_every_frame_and_never_a_blank(opened):
    for box in opened.boxes():
        walk = box.walk()
        for _ in range(3):  # a busy machine may drop a paint; a bad slider always does
            must, paints = held(box, walk)
            assert {paint["count"] for paint in paints} == {1}, f"{box.name}: blank or double"
            showed = [paint["frame"] for paint in paints]
            showed = showed[:1] + [b for a, b in zip(showed, showed[1:]) if a != b]
            if showed == must:
                break
        assert showed == must, box.name


def test_every_list_before_a_frame_slider_changes_its_picture(opened):
    for box in opened.boxes():
        output = box.box.evaluate_handle("box => box.closest('.jp-OutputArea-output')")
        lists = output.as_element().query_selector_all(":not(.jupyter-widgets) > select")
        if lists:
            box.home()
            box.key("End", box.look()["max"])  # at w = 0 all classes look alike
        for choice in lists:
            options, seen = choice.query_selector_all("option"), set()
            for option in options:  # a list may cut the picture: look at the painted one
                choice.select_option(option.get_attribute("value"))
                shown = box.box.evaluate_handle("box => our.shown(box)[0]")
                seen.add(shown.as_element().screenshot())
            assert len(seen) == len(options) > 1, box.name


def use(control) -> None:
    """Change one ipywidgets control by mouse."""
    kind, page = control.get_attribute("class"), control.owner_frame().page
    control.scroll_into_view_if_needed()
    if "widget-dropdown" in kind:
        select = control.query_selector("select")  # its list is drawn outside the page
        count = len(select.query_selector_all("option"))
        chosen = select.evaluate("select => select.selectedIndex")
        select.select_option(index=(chosen + 1) % count)
    elif "slider" in kind:
        track = control.query_selector(".noUi-base").bounding_box()
        thumb = control.query_selector(".noUi-handle").bounding_box()
        start = thumb["x"] + thumb["width"] / 2
        quarter = track["width"] / 4 * (-1 if start > track["x"] + track["width"] / 2 else 1)
        page.mouse.move(start, thumb["y"] + thumb["height"] / 2)
        page.mouse.down()
        page.mouse.move(start + quarter, thumb["y"] + thumb["height"] / 2, steps=5)
        page.mouse.up()
    else:
        (control.query_selector("input") or control).click()


def changes(page, panel, before: str, seconds: float) -> bool:
    """True as soon as the panel shows pictures that differ from before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if page.evaluate("panel => our.pictures(panel)", panel) not in (before, ""):
            return True
        page.wait_for_timeout(50)
    return False


def test_every_widget_changes_its_picture_by_mouse(opened):
    for panel in opened.panels():
        controls = panel.query_selector_all(CONTROLS)
        inside = panel.query_selector_all("select, button, input, textarea, .noUi-handle")
        assert len(controls) == len(inside) > 0, "a kind of control that this test cannot use"
        for control in controls:
            name = " ".join(control.evaluate("control => (control.closest('.jupyter-widgets')"
                                             " || control).textContent").split())
            before = opened.page.evaluate("panel => our.pictures(panel)", panel)
            use(control)
            assert changes(opened.page, panel, before, 60), name


def test_latency_is_printed(opened, capsys):
    lines = []
    for box in opened.boxes():
        box.home()
        opened.page.evaluate("box => our.time(box)", box.box)
        key = "ArrowRight"
        for press in range(HELD):
            look = box.look()
            key = "ArrowLeft" if look["value"] == look["max"] else (
                "ArrowRight" if look["value"] == 0 else key)
            opened.page.keyboard.press(key)
            opened.page.wait_for_timeout(60 + 7 * (press % 5))
        times = sorted(opened.page.evaluate("our.stop()"))
        assert len(times) == HELD, box.name
        lines.append(f"{statistics.median(times):6.1f} {times[int(0.95 * HELD)]:6.1f} ms"
                     f"  {box.name}")
    with capsys.disabled():
        print(f"\n{FRONT_END}: key to picture, median and p95 of {HELD}")
        print("\n".join(lines))


def test_console_is_clean(opened):
    ours = [line for line in opened.complaints
            if not any(re.fullmatch(pattern, line.strip()) for pattern in NOT_OURS)]
    assert not ours
