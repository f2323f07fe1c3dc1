"""Web page, slides, lecture plan, student's copy, script of a notebook. By hand, seconds:

    python assets/tools/export.py html|lecture|student|script diffusion_tutorial.ipynb
    python assets/tools/export.py slides diffusion_tutorial.ipynb --minutes 50

Page and slides are one file each and fetch nothing when they are shown: npm fetches KaTeX and
reveal.js while exporting. The script, for torchrun, holds the cells tagged "train", the data,
the settings, and all definitions before them. A lecture lives in the metadata of its cells:

    "slideshow": {"slide_type": "slide"}    slide, subslide, or "-": on the same slide
    "lecture": {"paths": [50, 90],          the lectures, in minutes, that show this cell
                "minutes": 2, "ask": "...", of this slide, and a question on one before it
                "show": [0, 2],             paragraphs, else all; those left out are notes.
                                            Of code: names of functions, else none
                "outputs": ["image:0"]}     or "image", "html", "text" for all such; else all
"""
import argparse
import base64
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from definitions import ROOT, keeps, parse
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

PACKAGES = "katex@0.19.1", "reveal.js@6.0.2"
COMMON = HtmlFormatter().get_style_defs(".highlight") + """
body { color: #1a1d21; font-family: "Helvetica Neue", Helvetica, Arial, sans-serif; }
pre, code { font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { font-size: .88em; } a { color: #0072B2; } img { max-width: 100%; }
.highlight { background: #f6f7f9; border-left: 5px solid #0072B2; }
.output_text pre { border-left: 5px solid #cfd4da; } pre { padding: .4em .6em; margin: 0; }
table { border-collapse: collapse; font-size: .9em; } .katex-display { margin: .6em 0; }
th, td { padding: .25em .8em; border-bottom: 1px solid #cfd4da; text-align: left; }
"""
PAGE = """
body { max-width: 960px; margin: 2rem auto; padding: 0 1.5rem; font-size: 18px;
  line-height: 1.55; } pre { font-size: 14px; line-height: 1.4; overflow-x: auto; }
h1, h2, h3 { margin: 1.8em 0 .6em; } h2 { border-top: 1px solid #cfd4da; padding-top: 1em; }
.output_subarea { margin: .6em 0; overflow-x: auto; } .katex-display { overflow-x: auto; }
"""
DECK = """
.reveal .slides { text-align: left; line-height: 1.35; } strong { font-weight: bold; }
.reveal .slides section { font-size: calc(30px * var(--k)); width: 1280px; height: 720px;
  padding: 26px 48px 34px; box-sizing: border-box; } em { font-style: italic; }
h1, h2, h3 { font-size: 1.4em; line-height: 1.15; margin: 0 0 .45em; color: #0b3a5b; }
h1 { font-size: 1.65em; } p, ul, ol, table, .film, .highlight { margin: 0 0 .5em; }
ul, ol { padding-left: 1.2em; } .output_subarea:not(.output_text) { text-align: center; }
pre { line-height: 1.3; font-size: calc(21px * var(--k)); overflow: hidden; }
img { margin: 0 auto .2em; display: block; max-width: none; height: auto; }
.film input { width: 560px !important; } .film output { display: inline-block; min-width: 6em; }
p.where { font-size: 18px; color: #66717c; margin: -10px 0 .5em; }
.reveal section.ask { background: #0b3a5b; color: #fff; padding: 200px 110px 60px; }
section.ask p { font-size: 1.6em; } section.ask p.where { font-size: .9em; color: #b9d4e6; }
.reveal .slide-number { background: none; color: #66717c; top: 8px; bottom: auto; }
"""
FIT = """
const W = 1280, H = 720, MARGIN = 40, PARTS = 'pre, table, img, .katex-base, p, li';
function tooLarge(slide) {  // slides lie in the corner of the page until Reveal starts
  return slide.scrollHeight > H || [...slide.querySelectorAll(PARTS)].some(part => {
    const {right, bottom} = part.getBoundingClientRect();
    return right > W - MARGIN || bottom > H - MARGIN / 2
      || part.tagName == 'PRE' && part.scrollWidth > part.clientWidth; });
}
function fit(slide) {  // the largest type and pictures that the slide has room for
  slide.style.display = 'block';
  const all = [...slide.querySelectorAll('img')], seen = all.filter(i => i.clientWidth).length;
  for (let k = 1.2; k > 0.3; k -= 0.02) {
    slide.style.setProperty('--k', k.toFixed(2));
    for (const i of all)
      i.style.width = Math.min(W - 110, i.closest('.film') ? W : 1.6 * i.naturalWidth,
        620 * Math.min(k, 1) ** 3 / seen * i.naturalWidth / i.naturalHeight) + 'px';
    if (!tooLarge(slide)) break;
  }
  slide.style.display = '';
}
addEventListener('load', async () => {  // pictures are there by now, fonts are not
  await Promise.all([...document.fonts].map(font => font.load()));
  document.querySelectorAll('.slides > section').forEach(fit);
  Reveal.initialize({width: W, height: H, margin: 0, center: false, hash: true,
    slideNumber: 'c/t', controls: false, transition: 'none', plugins: [RevealNotes]}); });
"""
MATHS = """
document.querySelectorAll('.text_cell_render').forEach(cell => renderMathInElement(cell, {
  delimiters: [{left: '$$', right: '$$', display: true}, {left: '$', right: '$'}],
  output: cell.closest('aside') ? 'mathml' : 'htmlAndMathml'}));  // notes have no style sheet
"""
EXPORTER = HTMLExporter(template_name="basic", exclude_input_prompt=True,
                        exclude_output_prompt=True, exclude_anchor_links=True)
SILENT = """import os, sys  # written by assets/tools/export.py
if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
    sys.stdout = open(os.devnull, "w")
"""


def without_kernel(book: NotebookNode) -> NotebookNode:
    """The notebook, its outputs as a page can show them; captions become alt texts."""
    for cell, below in zip(book.cells, [*book.cells[1:], {"source": ""}]):
        caption = re.sub(r"[*$\\`]", "", re.split(r"(?<=[a-z)])\. |\n", below["source"])[0])
        for out in cell.get("outputs", ()):
            if "application/vnd.jupyter.widget-view+json" in out.get("data", {}):
                out.data = {"text/html": "<p><em>This needs a running notebook.</em></p>"}
            if "image/png" in out.get("data", {}):
                out.metadata["image/png"] = {"alt": caption or "output of the cell"}
    return book


def html_of(cells: list[NotebookNode]) -> str:
    """Some cells by nbconvert, without page around them."""
    return EXPORTER.from_notebook_node(nbformat.v4.new_notebook(
        cells=cells, metadata={"language_info": {"name": "python"}}))[0]


def page(book: NotebookNode, style: str, body: str, slides: bool = False) -> str:
    """One HTML document that holds all it needs: KaTeX with its fonts, and reveal.js."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([shutil.which("npm") or sys.exit("npm is needed: https://nodejs.org"),
                        "install", "--loglevel=error", "--no-audit", "--ignore-scripts",
                        "--prefer-offline", "--prefix", folder, *PACKAGES], check=True)
        katex, reveal = (Path(folder, "node_modules", name, "dist")
                         for name in ("katex", "reveal.js"))
        css = re.sub(r"url\((fonts/[^)]*)\)[^;}]*", lambda found: "url(data:font/woff2;base64,"
                     + base64.b64encode((katex / found[1]).read_bytes()).decode() + ")",
                     (katex / "katex.min.css").read_text())  # the first of three formats
        files = [katex / "katex.min.js", katex / "contrib/auto-render.min.js"]
        if slides:
            css += (reveal / "reset.css").read_text() + (reveal / "reveal.css").read_text()
            files += [reveal / "reveal.js", reveal / "plugin/notes.js"]
        scripts = [file.read_text().replace("</script", r"<\/script") for file in files]
    script = "</script><script>".join([*scripts, MATHS, FIT if slides else ""])
    title = re.search(r"^# (.+)$", book.cells[0].source, re.M)[1]
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{css}{COMMON}{style}</style></head>\n"
            f"<body>{body}<script>{script}</script></body></html>\n")


def make_html(book: NotebookNode) -> str:
    """The whole notebook as one page."""
    body = html_of(without_kernel(book).cells)
    return page(book, PAGE, re.sub(r'(href="[\w-]+)\.ipynb', r"\1.html", body))


def plan(book: NotebookNode, minutes: int) -> list[tuple]:
    """The slides of a lecture: section, minutes, question or "", cells."""
    slides, section = [], ""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            section = [section, *re.findall(r"^#{1,2} (.+)$", cell.source, re.M)][-1]
        lecture = cell.metadata.get("lecture", {})
        if minutes in lecture.get("paths", []):
            if cell.metadata.slideshow.slide_type in ("slide", "subslide"):
                slides.append((section, lecture.minutes, lecture.get("ask", ""), []))
            slides[-1][3].append(cell)
    return slides or sys.exit(f"This notebook has no lecture of {minutes} minutes.")


def print_plan(book: NotebookNode) -> None:
    """Each lecture as a table: when, how long, where, which cells, what to ask."""
    for minutes in sorted({minutes for cell in book.cells for minutes in
                           cell.metadata.get("lecture", {}).get("paths", ())}):
        print(f"\n{minutes} minutes\n")
        slides, at = plan(book, minutes), 0.0
        for section, length, ask, cells in slides:
            print(f"{at:5.1f} {length:4.1f} min  {section[:34]:34} ", *[c.id for c in cells])
            print(f"{'':17}ask: {ask}\n" if ask else "", end="")
            at += length
        print(f"{at:5.1f} minutes in all, {len(slides)} slides")


def cut(cell: NotebookNode) -> str:
    """Leave of a cell what its slide shows; returns the prose that becomes a note."""
    lecture = cell.metadata.lecture
    if cell.cell_type == "markdown":
        blocks = re.split(r"\n\s*\n", cell.source.strip())
        show = lecture.get("show", range(len(blocks)))
        cell.source = "\n\n".join(blocks[n] for n in show)
        hidden = "\n\n".join(block for n, block in enumerate(blocks) if n not in show)
        return re.sub(r"!\[[^]]*\]\([^)]*\)", "", hidden)  # without its pictures
    lines, parts = cell.source.split("\n"), []
    for node in filter(keeps, parse(cell.source).body):
        for inner in (node, *getattr(node, "body", ())):
            name = getattr(inner, "name", "")
            if (name if inner is node else f"{node.name}.{name}") in lecture.get("show", ()):
                text = lines[inner.lineno - 1:inner.end_lineno]
                parts.append("\n".join(line[inner.col_offset:] for line in text))
    cell.source = "\n\n".join(parts)
    cell.metadata.transient = {"remove_source": not parts}  # nbconvert's own mark
    kinds = ["image" if "image/png" in out.get("data", {}) else
             "html" if "text/html" in out.get("data", {}) else "text" for out in cell.outputs]
    show = lecture.get("outputs", ("image", "html", "text"))
    cell.outputs = [out for n, out in enumerate(cell.outputs) if kinds[n] in show
                    or f"{kinds[n]}:{kinds[:n].count(kinds[n])}" in show]
    return ""


def make_slides(book: NotebookNode, minutes: int) -> str:
    """The deck of the lecture of this many minutes; a question gets a slide of its own."""
    body = ""
    for section, length, ask, cells in plan(without_kernel(book), minutes):
        note = nbformat.v4.new_markdown_cell("\n\n".join([f"{length:g} min", *map(cut, cells)]))
        end = f'<aside class="notes">{html_of([note])}</aside></section>\n'
        where = f'<p class="where">{html.escape(section)}</p>'
        if ask:
            body += f'<section class="ask">{where}<p>{html.escape(ask)}</p>{end}'
        names = " ".join(cell.id for cell in cells)
        body += f'<section data-cells="{names}">{where}{html_of(cells)}{end}'
    return page(book, DECK, f'<div class="reveal"><div class="slides">{body}</div></div>', True)


def make_student(book: NotebookNode) -> str:
    """The notebook without solutions, and with exercises that were not run."""
    book.cells = [c for c in book.cells if "solution" not in c.metadata.get("tags", [])]
    for cell in book.cells:
        if cell.cell_type == "code" and (
                cell.id.endswith("-try") or "exercise" in cell.metadata.get("tags", [])):
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(book) + "\n"


def make_script(book: NotebookNode) -> str:
    """A program of the cells tagged "train", data, settings, and definitions before them."""
    cells, parts = [c for c in book.cells if c.cell_type == "code"], [SILENT]
    train = [n for n, c in enumerate(cells) if "train" in c.metadata.get("tags", [])]
    if not train:
        sys.exit('This notebook has no cell tagged "train".')
    for number, cell in enumerate(cells[:train[-1] + 1]):
        lines, end = cell.source.split("\n"), 0
        for node in parse(cell.source).body:
            if number in train or keeps(node) or cell.id in ("setup", "choose", "settings"):
                parts += lines[end:node.end_lineno]  # with decorators and comments above it
            end = node.end_lineno
    return re.sub(r"^[%!].*", "", "\n".join(parts), flags=re.M) + "\n"


def main() -> None:
    """Read the command line, make what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("html", "slides", "lecture", "student", "script"))
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--to", type=Path, help="file to write, else in runs/")
    parser.add_argument("--minutes", type=int, choices=(50, 90), default=50, help="of slides")
    args = parser.parse_args()
    book, stem = nbformat.read(args.notebook, as_version=4), args.notebook.stem
    if args.kind == "lecture":
        return print_plan(book)
    make, name = {"html": (make_html, f"{stem}.html"), "script": (make_script, "train.py"),
                  "student": (make_student, f"{stem}-student.ipynb"),
                  "slides": (lambda book: make_slides(book, args.minutes),
                             f"{stem}-{args.minutes}.html")}[args.kind]
    file = args.to or ROOT / "runs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(make(book), encoding="utf8")
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
