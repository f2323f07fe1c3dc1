"""The notebooks in a real JupyterLab in a real browser: run, slide, click.

.ci/matrix runs the same in Notebook 7 (BROWSER_FRONT_END=notebook)."""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT

NOTEBOOKS = ("diffusion_tutorial.ipynb", "latent_diffusion_cab.ipynb")
FRONT_END = os.environ.get("BROWSER_FRONT_END", "lab")  # or "notebook"
ADDRESS = {"lab": "lab/tree", "notebook": "notebooks"}[FRONT_END]
SLIDER = ".jp-OutputArea-output .film"
SETTINGS = {  # all cells stay in the page
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
NOT_OURS = (  # errors of a healthy front end: attached pictures, Notebook 7.6's own settings
    r"Failed to load resource: net::ERR_UNKNOWN_URL_SCHEME attachment:[\w.-]+",
    r"Cannot read properties of undefined \(reading 'schema'\)")
CONTROLS = ".slider, .widget-dropdown, .widget-button, .widget-checkbox, .widget-text"

# Read the page from inside. A box is a slider with its frames, a panel holds ipywidgets.
HELPERS = """
window.our = {
  boxes: () => [...jupyterapp.shell.currentWidget.node.querySelectorAll('SLIDER')],
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
  // All code cells from the first to the one that makes the panel.
  ran: () => our.cells().slice(0, 1 + our.cells().findLastIndex(
    cell => cell.model.sharedModel.source.includes('ipywidgets'))),
  run: () => { const book = jupyterapp.shell.currentWidget.content; our.done = false;
    book.activeCellIndex = 1 + book.widgets.indexOf(our.ran().at(-1));
    jupyterapp.commands.execute('notebook:run-all-above')
      .finally(() => { our.done = true; }); },
  finished: () => our.done && our.kernel().status === 'idle',
  // The bytes of all visible pictures of a panel, as one text.
  pictures: async panel => { const all = our.shown(panel);
    const bytes = await Promise.all(all.map(async image => {
      const data = await (await fetch(image.src)).arrayBuffer();
      return [...new Uint8Array(await crypto.subtle.digest('SHA-256', data))].join(); }));
    return bytes.join('|'); },
};
""".replace("SLIDER", SLIDER)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Jupyter server over a copy of the repository: its address, with the token."""
    home = tmp_path_factory.mktemp("browser")
    shutil.copytree(ROOT, home / "repo", ignore=shutil.ignore_patterns(
        ".*", "runs", "venv", "tests", "__pycache__", "*-ubyte"))
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    folders = {f"JUPYTER{kind}_DIR": str(home / kind.strip("_").split("_")[-1].lower())
               for kind in ("_CONFIG", "_DATA", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    address, token = f"http://127.0.0.1:{port}", os.urandom(16).hex()
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", FRONT_END, "--no-browser", "--allow-root",
             "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
             f"--IdentityProvider.token={token}"],
            cwd=home / "repo", stdout=log, stderr=log,
            env={**os.environ, **folders, "DIFFUSION_PROFILE": "smoke"})
    try:
        for _ in range(1200):
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            assert process.poll() is None, (home / "log").read_text()[-3000:]
            time.sleep(0.25)
        yield lambda notebook: f"{address}/{ADDRESS}/{notebook}?reset&token={token}"
    finally:
        process.terminate()  # it stops its kernels first
        process.wait(60)


class Opened:
    """A notebook in the browser: as it was opened, then run from the top to its panel."""
    def __init__(self, browser, address):
        self.page, self.complaints = browser.new_page(
            viewport={"width": 1280, "height": 900}), []
        self.page.set_default_timeout(300_000)
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(
            f"{line.text} {line.location.get('url', '')}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.add_init_script(HELPERS)
        self.page.goto(address, timeout=600_000)
        self.page.wait_for_function("our.ready()", timeout=600_000)
        self.node = self.page.evaluate_handle("jupyterapp.shell.currentWidget.node")
        self.as_opened = self.page.evaluate("our.boxes().map(our.look)")
        self.page.evaluate("our.run()")
        self.page.wait_for_function("our.finished()", timeout=840_000, polling=500)
        self.cells = self.page.evaluate(
            "our.ran().map(cell => ({id: cell.model.id, count: cell.model.executionCount,"
            " outputs: cell.model.outputs.toJSON()}))")
        boxes = self.page.evaluate_handle(
            f"our.ran().flatMap(cell => [...cell.node.querySelectorAll('{SLIDER}')])")
        self.boxes = [Box(self.page, box.as_element())
                      for box in boxes.get_properties().values()]


class Box:
    """One slider in the page."""
    def __init__(self, page, box):
        self.page, self.box, self.slider = page, box, box.query_selector("input[type=range]")
        self.name = self.slider.get_attribute("aria-label")

    def look(self):
        """The frame that is shown."""
        return self.page.evaluate("box => our.look(box)", self.box)

    def key(self, name, value):
        """Press a key on the slider; wait for the value that it must lead to, and look."""
        self.slider.focus()
        self.page.keyboard.press(name)
        self.page.wait_for_function("([box, value]) => our.look(box).value === value",
                                    arg=[self.box, value], timeout=300_000)
        return self.look()

    def walk(self):
        """All frames by the right arrow, first to last."""
        self.slider.scroll_into_view_if_needed()
        seen = [self.key("Home", 0)]
        while seen[-1]["value"] < seen[0]["max"]:
            seen.append(self.key("ArrowRight", seen[-1]["value"] + 1))
        return seen


@pytest.fixture(scope="module", params=NOTEBOOKS)
def opened(request, browser, server):
    """Each notebook in turn, run in the browser once for all tests."""
    notebook = Opened(browser, server(request.param))
    yield notebook
    notebook.page.evaluate("our.kernel().shutdown()")
    notebook.page.close()


def test_every_cell_runs_and_before_that_each_slider_shows_its_first_frame(opened):
    for number, cell in enumerate(opened.cells, 1):
        assert not [out for out in cell["outputs"] if out["output_type"] == "error"], cell
        assert cell["count"] == number, cell["id"]
    assert opened.as_opened
    for look in opened.as_opened:
        assert (look["count"], look["frame"]) == (1, 0) and look["text"]


def test_every_slider_follows_the_keys_in_sight_of_its_picture(opened):
    assert opened.boxes
    for box in opened.boxes:
        seen, last = box.walk(), box.look()["max"]
        frames, texts, pictures = (len({look[what] for look in seen})
                                   for what in ("frame", "text", "picture"))
        assert {look["count"] for look in seen} == {1} and last > 0, box.name
        assert frames == texts == len(seen) < 2 * pictures, box.name  # smoke: two alike
        assert box.box.bounding_box()["height"] <= 720, box.name  # in sight
        assert box.key("Home", 0) == seen[0] and box.key("End", last) == seen[-1]
        assert box.key("ArrowLeft", last - 1) == seen[-2]


def use(control, page):
    """Change one ipywidgets control by mouse; type into a line of text."""
    kind = control.get_attribute("class")
    control.scroll_into_view_if_needed()
    if "widget-dropdown" in kind:
        select = control.query_selector("select")  # its list is drawn outside the page
        chosen = select.evaluate("select => [select.selectedIndex, select.options.length]")
        select.select_option(index=(chosen[0] + 1) % chosen[1])
    elif "widget-text" in kind:  # a Combobox is one, too
        line = control.query_selector("input")
        line.fill(line.input_value() + " bold")
        line.press("Enter")
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


def test_every_widget_changes_its_picture_by_mouse(opened):
    where = ".jp-OutputArea-output:has(.jupyter-widgets)"
    opened.page.wait_for_selector(where, state="attached")  # fails where none is drawn
    for panel in opened.node.query_selector_all(where):
        controls = panel.query_selector_all(CONTROLS)
        assert controls
        for control in controls:
            before = opened.page.evaluate("panel => our.pictures(panel)", panel)
            use(control, opened.page)
            end = time.monotonic() + 300
            while opened.page.evaluate("panel => our.pictures(panel)", panel) in (before, ""):
                assert time.monotonic() < end, control.inner_text()
                opened.page.wait_for_timeout(50)


def test_console_is_clean(opened):
    assert not [line for line in opened.complaints
                if not any(re.fullmatch(pattern, line.strip()) for pattern in NOT_OURS)]
