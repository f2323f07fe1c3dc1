"""Pages and slides as a reader opens them: from a file, in a browser, with no network."""
import json
import os
import re
import shutil
import subprocess
import sys

import export
import nbformat
import pytest
from conftest import ROOT

NAMES = ("diffusion_tutorial", "latent_diffusion_cab")
PATHS = (50, 90)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
         " --disable-background-networking --disable-component-update").split()
PICTURE = """e => [...e.querySelectorAll('img')].filter(i => i.getClientRects().length)
    .map(i => i.src).join()"""  # what is visible of a frame slider
OUTSIDE = """() => [...Reveal.getCurrentSlide().querySelectorAll('*')].filter(e => {
    if (e.closest('aside, .katex-mathml, .katex-base *') || !e.getClientRects().length)
        return false;
    const r = e.getBoundingClientRect();
    return r.right > 1281 || r.bottom > 721 || r.left < -1 || r.top < -1
        || e.tagName == 'PRE' && e.scrollWidth > e.clientWidth; })
    .map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 60))"""


def missing(what):
    """Skip for want of a program, but fail where the project's checks run."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both notebooks exported in each way: {(name, "html" or minutes): file}."""
    if not (shutil.which("npm") and shutil.which("node")):
        missing("npm")
    folder, files = tmp_path_factory.mktemp("exported"), {}
    modules = export.install(folder)  # once for all but the last, which is the command's own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "install", lambda folder: modules)
        for name in NAMES:
            for what in ("html", *PATHS):
                files[name, what] = folder / f"{name}-{what}.html"
                path = ROOT / f"{name}.ipynb"
                export.write(export.make_html(path) if what == "html" else
                             export.make_slides(path, what), files[name, what])
    last = files[NAMES[1], 50]
    ours = last.read_text()
    subprocess.run([sys.executable, ROOT / "tests/export.py", "slides", path, "--minutes",
                    "50", "--to", last], check=True)
    assert last.read_text() == ours
    return files


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by Playwright."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                 "google-chrome"))), None)
    if not found:
        missing("Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield program
        program.close()


@pytest.fixture
def opened(browser, exported):
    """A function that opens an exported file offline; whatever it fetches fails the test."""
    context, asked, complaints = browser.new_context(
        viewport={"width": 1280, "height": 720}), [], []
    context.set_offline(True)

    def on_request(route):
        asked.append(route.request.url)
        route.continue_() if route.request.url.startswith("file:") else route.abort()

    context.route(lambda url: not url.startswith("data:"), on_request)

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
    assert len(asked) == 1 and asked[0].startswith("file:"), asked
    assert not complaints, complaints


def book_of(name):
    """A notebook as committed."""
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def outputs(book, start):
    """How many outputs of a notebook have a kind that begins with start."""
    return sum(any(kind.startswith(start) for kind in out.get("data", {}))
               for cell in book.cells if cell.cell_type == "code" for out in cell.outputs)


def try_slider(page, slider):
    """Arrow key, mouse and play button each change the picture above a frame slider."""
    frames = slider.locator("xpath=ancestor::*[contains(@class, 'frames')]")
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
    frames.locator("button").first.click()
    page.wait_for_function("([e, old]) => [...e.querySelectorAll('img')].every(i =>"
                           " !i.getClientRects().length || i.src != old)",
                           arg=[frames.element_handle(), seen[0]], timeout=20_000)
    frames.locator("button").first.click()
    assert all(seen) and len(set(seen)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_page_works_from_a_file_without_network(name, opened):
    page, book = opened(name, "html"), book_of(name)
    sliders = page.locator(".frames input[type=range]")
    assert sliders.count() == sum(
        'class="frames"' in out.get("data", {}).get("text/html", "") for cell in book.cells
        if cell.cell_type == "code" for out in cell.outputs) > 0
    for number in range(sliders.count()):
        try_slider(page, sliders.nth(number))
    pictures = page.locator(".output_subarea > img")
    assert pictures.count() == outputs(book, "image/") > 10
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
        all.querySelectorAll('.katex, pre, code').forEach(e => e.remove());
        return all.textContent; })()""")
    assert not re.search(r"\$|\\\(|\\[a-z]+|FORMULA\d|KaTeX", prose)


@pytest.mark.parametrize("name", NAMES)
def test_page_says_where_a_kernel_is_needed(name, opened):
    page, book = opened(name, "html"), book_of(name)
    live = outputs(book, "application/vnd.jupyter.widget-view")
    assert page.get_by_text(export.DEAD).count() == live
    assert "VBox(children" not in page.inner_text("body")
    assert not page.locator("script").count()


def test_files_are_small_and_name_no_other_file(exported):
    for file in exported.values():
        text = re.sub("<script>.*?</script>", "", file.read_text(), flags=re.S)
        assert file.stat().st_size <= export.LIMIT == 12_000_000
        assert not re.search(r"<(script|link|iframe|img)[^>]+(src|href)=\"(?!data:)", text)
        assert not re.search(r"@import|url\((?!data:)[^)]", text.split("</style>")[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("minutes", PATHS)
def test_slides_fit_and_are_large_enough(name, minutes, opened):
    page = opened(name, minutes)
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


@pytest.mark.parametrize("name", NAMES)
def test_arrow_moves_frames_and_not_slides(name, opened):
    page, tried = opened(name, 90), 0
    for number in range(page.evaluate("Reveal.getTotalSlides()")):
        page.evaluate(f"Reveal.slide({number})")
        slider = page.locator("section.present .frames input[type=range]")
        if slider.count():
            try_slider(page, slider)
            assert page.evaluate("Reveal.getIndices().h") == number
            slider.evaluate("e => e.blur()")
            page.keyboard.press("ArrowRight")
            assert page.evaluate("Reveal.getIndices().h") == number + 1
            tried += 1
    assert tried >= 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("minutes", PATHS)
def test_deck_is_the_path_with_its_questions(name, minutes, opened):
    page, book = opened(name, minutes), book_of(name)
    slides = export.plan(book, minutes)
    shown = page.evaluate("[...document.querySelectorAll('section[data-cells]')]"
                          ".map(s => s.dataset.cells)")
    assert shown == [slide.names for slide in slides]
    asked = page.evaluate("""[...document.querySelectorAll('section.ask')].map(s =>
        [s.querySelector('p:not(.where)').textContent, s.querySelector('aside').textContent,
         s.nextElementSibling.querySelector('aside').textContent])""")
    assert [question for question, *_ in asked] == [s.ask for s in slides if s.ask]
    assert all(question in note for question, *notes in asked for note in notes)
    seconds = page.evaluate("[...document.querySelectorAll('section')].map(s =>"
                            " +s.dataset.timing).reduce((a, b) => a + b)")
    assert seconds == 60 * minutes


@pytest.mark.parametrize("name", NAMES)
def test_minutes_of_each_path_add_up(name, capsys):
    book = book_of(name)
    for minutes in PATHS:
        slides = export.plan(book, minutes)
        assert sum(slide.minutes for slide in slides) == minutes
        assert 0 < min(s.minutes for s in slides) and max(s.minutes for s in slides) <= 5
        assert sum(bool(slide.ask) for slide in slides) >= minutes // 6
        assert all(s.ask.endswith("?") for s in slides if s.ask)
    short, long = ({i for s in export.plan(book, m) for i in s.names.split()} for m in PATHS)
    assert short < long
    print(export.make_plan(ROOT / f"{name}.ipynb"))
    table = capsys.readouterr().out
    assert re.findall(r"([\d.]+)  minutes in all", table) == ["50.0", "90.0"]
    assert all(s.ask in table for s in export.plan(book, 90))


def toy(tmp_path, *cells):
    """A small notebook file of these cells."""
    file = tmp_path / "toy.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), file)
    return file


def run(monkeypatch, *words):
    """The command line in this process."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    export.main()


def test_student_copy_has_no_solutions(tmp_path, monkeypatch):
    new, output = nbformat.v4, nbformat.v4.new_output("stream", text="7\n")
    file = toy(tmp_path, new.new_markdown_cell("### Exercise\n\nFind x."),
               new.new_code_cell("x = ...", metadata={"tags": ["exercise"]},
                                 outputs=[output], execution_count=1),
               new.new_markdown_cell("It is forty-two", metadata={"tags": ["solution"]}),
               new.new_code_cell("x = forty_two", metadata={"tags": ["more", "solution"]}),
               new.new_code_cell("print(7)", outputs=[output], execution_count=2),
               new.new_code_cell("y = ...", id="ex-y-try", outputs=[output]))
    run(monkeypatch, "student", file, "--to", tmp_path / "out.ipynb")
    before, after = (nbformat.read(f, 4) for f in (file, tmp_path / "out.ipynb"))
    nbformat.validate(after)
    assert not re.search("forty.two", (tmp_path / "out.ipynb").read_text())
    assert [c.id for c in after.cells] == [before.cells[n].id for n in (0, 1, 4, 5)]
    assert after.cells[1].outputs == after.cells[3].outputs == []
    assert after.cells[1].execution_count is None
    assert after.cells[2] == before.cells[4] and after.cells[0] == before.cells[0]


@pytest.mark.parametrize("name", NAMES)
def test_student_copy_of_the_notebooks(name, tmp_path, monkeypatch):
    run(monkeypatch, "student", ROOT / f"{name}.ipynb", "--to", tmp_path / "out.ipynb")
    book, copy = book_of(name), nbformat.read(tmp_path / "out.ipynb", 4)
    nbformat.validate(copy)
    kept = [c for c in book.cells if "solution" not in c.metadata.get("tags", [])]
    assert [(c.id, c.source) for c in copy.cells] == [(c.id, c.source) for c in kept]
    assert copy.metadata == book.metadata


def lecture(kind="slide", **facts):
    """Metadata of a cell on a 50-minute path."""
    return {"slideshow": {"slide_type": kind}, "lecture": {"paths": [50], **facts}}


def test_slide_shows_what_its_metadata_say(tmp_path):
    new = nbformat.v4
    cells = [new.new_markdown_cell("# A\n\nshown $x$\n\nsaid $y$",
                                   metadata=lecture(minutes=50, show=[0, 1])),
             new.new_code_cell("def f():\n    return 1\n\n\ndef g():\n    return 2",
                               metadata=lecture("-", show=["g"]),
                               outputs=[new.new_output("stream", text="out")]),
             new.new_code_cell("hidden()", metadata=lecture("fragment", outputs=["text"]),
                               outputs=[new.new_output("stream", text="seen")]),
             new.new_markdown_cell("only said", metadata=lecture("notes")),
             new.new_markdown_cell("left out", metadata=lecture("skip"))]
    book = export.prepare(export.read(toy(tmp_path, *cells)), True)
    formulas = export.Formulas()
    slide, = export.plan(book, 50)
    text = export.slide_html(slide, export.Exporter(formulas, tmp_path))
    body, note = (re.sub("<[^>]*>", "", part) for part in text.split("<aside"))
    for word in ("shown FORMULA1Q", "def g", "return 2", "out", "seen"):
        assert word in body and word not in note
    for word in ("def f", "hidden", "said", "left out"):
        assert word not in body
    assert "said FORMULA0Q" in note and "only said" in note and "left out" not in note
    assert [job[2] for job in formulas.jobs] == ["mathml", "htmlAndMathml"]
    assert '<div class="fragment">' in text


@pytest.mark.parametrize("words, cell, sentence", [
    (["html", "nowhere.ipynb"], None, "there is no notebook nowhere.ipynb"),
    (["html", "{text}"], None, "is not a valid notebook"),
    (["slides", "{toy}", "--minutes", "45"], lecture(minutes=50), "known are [50]"),
    (["slides", "{toy}", "--minutes", "50"], {}, "no cell has any"),
    (["slides", "{toy}", "--minutes", "50"], lecture(), "without minutes"),
    (["slides", "{toy}", "--minutes", "50"], lecture("-"), "before the first slide"),
    (["slides", "{toy}", "--minutes", "50"], lecture(minutes=50, show=[7]), "paragraphs"),
    (["lecture", "{toy}"], {}, "has no lecture"),
    (["html", "{toy}"], {}, "npm and node are needed"),
])
def test_bad_input_is_one_sentence(words, cell, sentence, tmp_path, monkeypatch):
    file = toy(tmp_path, nbformat.v4.new_markdown_cell("# A", metadata=cell or {}))
    (tmp_path / "text").write_text("no JSON")
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm there
    words = [word.format(toy=file, text=tmp_path / "text") for word in words]
    with pytest.raises(SystemExit, match=re.escape(sentence)) as stopped:
        run(monkeypatch, *words)
    assert "\n" not in str(stopped.value)


def test_broken_formula_is_named(exported, tmp_path, monkeypatch):
    file = toy(tmp_path, nbformat.v4.new_markdown_cell(r"$x$ and $\frac{a}$"))
    with pytest.raises(SystemExit, match=re.escape(r"cannot read the formula \frac{a}")):
        run(monkeypatch, "html", file, "--to", tmp_path / "a.html")


def test_too_large_a_page_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LIMIT", 1000)
    file = toy(tmp_path, nbformat.v4.new_markdown_cell("long " * 300))
    with pytest.raises(SystemExit, match="more than"):
        run(monkeypatch, "student", file, "--to", tmp_path / "a.ipynb")
    assert not (tmp_path / "a.ipynb").exists()


@pytest.mark.parametrize("name", NAMES)
def test_metadata_names_what_is_there(name):
    book = export.prepare(book_of(name), True)
    for cell in book.cells:
        if "lecture" in cell.metadata:
            assert set(cell.metadata.lecture) <= {"paths", "minutes", "ask", "show", "outputs"}
            make = export.chosen_prose if cell.cell_type == "markdown" else export.chosen_code
            make(cell)
    assert json.dumps(book_of(name).metadata).count("lecture") == 0
