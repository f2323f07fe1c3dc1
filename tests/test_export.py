"""Pages, slides and scripts as a reader opens them: from a file, with no network."""
import os
import re
import shutil
import subprocess
import sys

import export
import nbformat
import pytest
import torch
from conftest import ROOT, needed

NAMES = ("diffusion_tutorial", "latent_diffusion_cab")
LECTURES = [(NAMES[0], 50), (NAMES[0], 90), (NAMES[1], 50)]
PICTURE = """e => [...e.querySelectorAll('img')].filter(i => i.getClientRects().length)
    .map(i => i.src).join()"""  # what is visible of a frame slider
OUTSIDE = """() => [...Reveal.getCurrentSlide().querySelectorAll('*')].filter(e => {
    if (e.closest('aside, .katex-mathml, .katex-base *') || !e.getClientRects().length)
        return false;
    const r = e.getBoundingClientRect();
    return r.right > 1281 || r.bottom > 721 || r.left < -1 || r.top < -1
        || e.tagName == 'PRE' && e.scrollWidth > e.clientWidth; })
    .map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 60))"""


def run(*words):
    """The command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, words)])
        export.main()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both notebooks exported in each way: {(name, "html" or minutes): file}."""
    needed(shutil.which("npm"), "npm")
    folder, files = tmp_path_factory.mktemp("exported"), {}
    for name, what in [*((name, "html") for name in NAMES), *LECTURES]:
        files[name, what] = folder / f"{name}-{what}.html"
        kind = ["html"] if what == "html" else ["slides", "--minutes", what]
        run(*kind, ROOT / f"{name}.ipynb", "--to", files[name, what])
    return files


@pytest.fixture
def opened(browser, exported):
    """A function that opens an exported file offline; whatever it fetches fails the test."""
    context, asked, complaints = browser.new_context(
        viewport={"width": 1280, "height": 720}), [], []
    context.set_offline(True)
    context.on("request", lambda request: request.url.startswith("data:")
               or asked.append(request.url))

    def show(name, what):
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(exported[name, what].as_uri())
        page.wait_for_load_state("load")
        if what != "html":
            page.wait_for_function("window.Reveal && Reveal.isReady()")
        return page

    yield show
    context.close()
    assert len(asked) == 1 and asked[0].startswith("file:"), asked  # nothing but the page
    assert not complaints, complaints


def book_of(name):
    """A notebook as committed."""
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def try_slider(page, slider):
    """Arrow key and mouse each change the picture above a frame slider."""
    frames = slider.locator("xpath=ancestor::div[contains(@class, 'film')]")
    seen = [frames.evaluate(PICTURE)]
    slider.focus()
    page.keyboard.press("ArrowRight")
    seen.append(frames.evaluate(PICTURE))
    box = slider.bounding_box()
    slider.click(position={"x": 0.8 * box["width"], "y": box["height"] / 2})
    seen.append(frames.evaluate(PICTURE))
    slider.focus()
    page.keyboard.press("Home")
    assert frames.evaluate(PICTURE) == seen[0]
    assert all(seen) and len(set(seen)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_page_works_from_a_file_without_network(name, opened):
    page, data = opened(name, "html"), [out.get("data", {}) for cell in book_of(name).cells
                                        for out in cell.get("outputs", ())]
    sliders = page.locator(".film input[type=range]")
    assert sliders.count() == sum(
        'class="film"' in each.get("text/html", "") for each in data) > 0
    for number in range(sliders.count()):
        try_slider(page, sliders.nth(number))
    pictures = page.locator(".output_subarea > img")
    assert pictures.count() == sum("image/png" in each for each in data) > 10
    assert all(page.evaluate("[...document.images].map(i => i.naturalWidth * i.alt.length)"))


@pytest.mark.parametrize("name", NAMES)
def test_page_shows_formulas(name, opened):
    page = opened(name, "html")
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    wide = page.evaluate("[...document.querySelectorAll('.katex-html')]"
                         ".map(e => e.getBoundingClientRect().width)")
    source = "\n".join(c.source for c in book_of(name).cells if c.cell_type == "markdown")
    written = re.findall(r"\$\$.+?\$\$|\$.+?\$", re.sub(r"`[^`]*`", "", source), re.S)
    assert len(wide) == len(written) > 30 and min(wide) > 1
    assert page.evaluate("document.fonts.check('16px KaTeX_Math')")
    prose = page.evaluate("""(() => { const all = document.body.cloneNode(true);
        all.querySelectorAll('.katex, pre, code, script').forEach(e => e.remove());
        return all.textContent; })()""")
    assert not re.search(r"\$|\\\(|\\[a-z]+", prose)


@pytest.mark.parametrize("name, minutes", LECTURES)
def test_slides_fit_and_are_large_enough(name, minutes, opened):
    page = opened(name, minutes)
    assert sum(slide[1] for slide in export.plan(book_of(name), minutes)) == minutes
    for number in range(page.evaluate("Reveal.getTotalSlides()")):
        page.evaluate(f"Reveal.slide({number})")
        where = page.evaluate("Reveal.getCurrentSlide().dataset.cells || 'question'")
        assert page.evaluate("Reveal.getCurrentSlide().scrollHeight") <= 720, where
        assert not (found := page.evaluate(OUTSIDE)), (where, found)
        small = page.evaluate("""[...Reveal.getCurrentSlide()
            .querySelectorAll('p:not(.where), li, td, pre')]
            .filter(e => e.getClientRects().length && e.textContent.trim())
            .map(e => parseFloat(getComputedStyle(e).fontSize))""")
        assert min(small, default=99) >= 16, where


def test_two_processes_train_as_one(tmp_path):
    """The exported script under torchrun, gloo, one thread each, in float32."""
    run("script", ROOT / f"{NAMES[0]}.ipynb", "--to", tmp_path / "train.py")
    text = (tmp_path / "train.py").read_text()
    (tmp_path / "train.py").write_text(
        "import torch\ntorch.cpu._is_avx512_bf16_supported = lambda: False\n" + text)
    started = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "assets").symlink_to(ROOT / "assets")
        started.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             "--nproc-per-node", str(count), "../train.py"], cwd=folder, text=True,
            env={**os.environ, "DIFFUSION_PROFILE": "smoke", "MPLBACKEND": "agg"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for process in started:
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said[-3000:]
    one, two = (torch.load(next((tmp_path / str(count) / "runs").glob("together-*.pt")),
                           weights_only=True) for count in (1, 2))
    for part in ("net", "ema"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_student_copy_has_no_solutions(name, tmp_path):
    run("student", ROOT / f"{name}.ipynb", "--to", tmp_path / "out.ipynb")
    copy = nbformat.read(tmp_path / "out.ipynb", 4)
    kept = [c for c in book_of(name).cells if "solution" not in c.metadata.get("tags", [])]
    assert [(c.id, c.source) for c in copy.cells] == [(c.id, c.source) for c in kept]
    assert not any(c.outputs for c in copy.cells if c.id.endswith("-try"))
