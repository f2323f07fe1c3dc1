"""Web page, slides, lecture plan, student's copy, script of a notebook. By hand, seconds:

    python assets/tools/export.py html diffusion_tutorial.ipynb
    python assets/tools/export.py slides diffusion_tutorial.ipynb --minutes 50
    python assets/tools/export.py lecture|student|script diffusion_tutorial.ipynb

Page and slides are one file each and fetch nothing when they are shown: KaTeX and reveal.js
are written into them (npm fetches both while exporting). The script, for torchrun, holds the
cells tagged "train", the data, the settings, and all definitions before them.

A lecture lives in the metadata of its cells:

    "slideshow": {"slide_type": "slide"}    slide, subslide, or "-": on the same slide
    "lecture": {"paths": [50, 90],          the lectures, in minutes, that show this cell
                "minutes": 2,               of this slide (slide and subslide only)
                "ask": "...",               a question for the room, on a slide before
                "show": [0, 2],             prose: its paragraphs, counted from 0; the others
                                            become speaker notes. Code: names of functions
                                            and methods. Without it prose is shown, code not
                "outputs": ["image"]}       of a code cell: "image", "text", "html", or
                                            "image:0", the first of them; without it all
"""
import argparse
import ast
import base64
import html
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import nbformat
from definitions import ROOT, keeps
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

PACKAGES = "katex@0.19.1", "reveal.js@6.0.2"
DEAD = "This control needs a running notebook. The pictures around it tell the story."
COMMON = HtmlFormatter().get_style_defs(".highlight") + """
body { color: #1a1d21; font-family: "Helvetica Neue", Helvetica, Arial, sans-serif; }
pre, code { font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { font-size: .88em; } a { color: #0072B2; } img { max-width: 100%; }
.highlight { background: #f6f7f9; border-left: 5px solid #0072B2; }
.output_text pre { border-left: 5px solid #cfd4da; } pre { padding: .4em .6em; margin: 0; }
table { border-collapse: collapse; font-size: .9em; } .katex-display { margin: .6em 0; }
th, td { padding: .25em .8em; border-bottom: 1px solid #cfd4da; text-align: left; }
input[type=range] { vertical-align: middle; }
.dead { border-left: 5px solid #E69F00; padding: .3em .8em; background: #fdf6e7; }
"""
PAGE = """
body { max-width: 960px; margin: 2rem auto; padding: 0 1.5rem; font-size: 18px;
  line-height: 1.55; } pre { font-size: 14px; line-height: 1.4; overflow-x: auto; }
h1, h2, h3 { line-height: 1.2; margin: 1.8em 0 .6em; }
h2 { border-top: 1px solid #cfd4da; padding-top: 1em; }
.output_subarea { margin: .6em 0; overflow-x: auto; } .katex-display { overflow-x: auto; }
"""
DECK = """
.reveal .slides { text-align: left; line-height: 1.35; } .reveal strong { font-weight: bold; }
.reveal .slides section { font-size: calc(30px * var(--k)); height: 720px;
  padding: 26px 48px 34px; box-sizing: border-box; }
.reveal :is(h1, h2, h3) { font-size: 1.4em; line-height: 1.15; margin: 0 0 .45em;
  color: #0b3a5b; } .reveal h1 { font-size: 1.65em; }
.reveal :is(p, ul, ol, table, .film, .highlight) { margin: 0 0 .5em; }
.reveal :is(ul, ol) { padding-left: 1.2em; display: block; }
.reveal pre { line-height: 1.3; font-size: calc(21px * var(--k)); overflow: hidden; }
.reveal em { font-style: italic; } .reveal .caption { font-size: .8em; color: #444c55; }
.reveal .output_subarea:not(.output_text) { text-align: center; }
.reveal img { margin: 0 auto .2em; display: block; max-width: none; }
.reveal .film input { width: 560px !important; }
.reveal .film output { display: inline-block; min-width: 6em; text-align: left; }
.reveal p.where { font-size: 18px; color: #66717c; margin: -10px 0 .5em; }
.reveal section.ask { background: #0b3a5b; color: #fff; padding: 200px 110px 60px; }
.reveal section.ask p { font-size: 1.6em; }
.reveal section.ask p.where { font-size: .9em; color: #b9d4e6; }
.reveal .slide-number { background: none; color: #66717c; top: 8px; bottom: auto; }
"""
FIT = """
const W = 1280, H = 720, MARGIN = 40;
function tooLarge(slide) {
  const left = slide.getBoundingClientRect().left, top = slide.getBoundingClientRect().top;
  return slide.scrollHeight > H
    || [...slide.querySelectorAll('pre, table, img, .katex-base, p, li')].some(part => {
      const box = part.getBoundingClientRect();
      return box.right > left + W - MARGIN || box.bottom > top + H - MARGIN / 2
        || part.tagName == 'PRE' && part.scrollWidth > part.clientWidth; });
}
function fit(slide) {  // the largest type and pictures that the slide has room for
  slide.style.display = 'block';
  const all = [...slide.querySelectorAll('img')], seen = all.filter(i => i.clientWidth).length;
  for (let k = 1.2; k > 0.3; k -= 0.02) {
    slide.style.setProperty('--k', k.toFixed(2));
    for (const i of all) {
      const most = i.closest('.film') ? W : 1.6 * i.naturalWidth, height = 620 * Math.min(
        k, 1) ** 3 / seen;
      i.style.height = 'auto';
      i.style.width = Math.min(W - 110, most, height * i.naturalWidth / i.naturalHeight) + 'px';
    }
    if (!tooLarge(slide)) break;
  }
  slide.style.display = '';
}
addEventListener('load', async () => {
  await Promise.all([...[...document.fonts].map(font => font.load()),
                     ...[...document.images].map(image => image.decode())]);
  document.querySelectorAll('.slides > section').forEach(fit);
  Reveal.initialize({width: W, height: H, margin: 0, center: false, hash: true,
    slideNumber: 'c/t', controls: false, transition: 'none', plugins: [RevealNotes]});
});
"""
MATHS = """
document.querySelectorAll('.text_cell_render').forEach(cell => renderMathInElement(cell, {
  delimiters: [{left: '$$', right: '$$', display: true}, {left: '$', right: '$'}],
  output: cell.closest('aside') ? 'mathml' : 'htmlAndMathml'}));  // notes have no style sheet
"""
EXPORTER = HTMLExporter(template_name="basic", exclude_input_prompt=True,
                        exclude_output_prompt=True, exclude_anchor_links=True)


def read(path: Path) -> NotebookNode:
    """The notebook, its outputs as a page without kernel can show them."""
    book = nbformat.read(path, as_version=4)
    for cell, below in zip(book.cells, [*book.cells[1:], {"source": ""}]):
        caption = re.sub(r"[*$\\`]", "", re.split(r"(?<=[a-z)])\. |\n", below["source"])[0])
        for out in cell.get("outputs", ()):
            if "application/vnd.jupyter.widget-view+json" in out.get("data", {}):
                out.data = {"text/html": f'<p class="dead">{DEAD}</p>'}
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
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--ignore-scripts",
                        "--prefer-offline", "--prefix", folder, *PACKAGES], check=True)
        katex, reveal = (Path(folder, "node_modules", name, "dist")
                         for name in ("katex", "reveal.js"))
        css = (katex / "katex.min.css").read_text()
        css = re.sub(r",url\([^)]*\.(?:woff|ttf)\) format\(\"[a-z]+\"\)", "", css)
        css = re.sub(r"url\((fonts/[^)]*)\)", lambda found: "url(data:font/woff2;base64,"
                     + base64.b64encode((katex / found[1]).read_bytes()).decode() + ")", css)
        scripts = [(katex / "katex.min.js").read_text(),
                   (katex / "contrib/auto-render.min.js").read_text(), MATHS]
        if slides:
            css += "".join((reveal / f"{name}.css").read_text() for name in ("reset", "reveal"))
            scripts += [(reveal / "reveal.js").read_text(),
                        (reveal / "plugin/notes.js").read_text(), FIT]
    title = re.search(r"^# (.+)$", book.cells[0].source, re.M)[1]
    script = "".join("<script>" + text.replace("</script", r"<\/script") + "</script>"
                     for text in scripts)
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{css}{COMMON}{style}</style></head>\n"
            f"<body>{body}{script}</body></html>\n")


def make_html(path: Path) -> str:
    """The whole notebook as one page."""
    book = read(path)
    body = re.sub(r'(href="[\w-]+)\.ipynb', r"\1.html", html_of(book.cells))
    return page(book, PAGE, body)


# ---------------------------------------------------------------- the lecture

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
    if not slides:
        sys.exit(f"This notebook has no lecture of {minutes} minutes.")
    return slides


def print_plan(path: Path) -> None:
    """Both lectures as tables: when, how long, where, which cells, what to ask."""
    for minutes in (50, 90):
        print(f"\n{minutes} minutes\n")
        slides, at = plan(read(path), minutes), 0.0
        for section, length, ask, cells in slides:
            names = " ".join(cell.id for cell in cells)
            print(f"{at:5.1f} {length:4.1f} min  {section[:34]:34}  {names}")
            print(f"{'':17}ask: {ask}\n" if ask else "", end="")
            at += length
        print(f"{at:5.1f} minutes in all, {len(slides)} slides")


def shown(cell: NotebookNode) -> tuple[str, str]:
    """What a slide shows of a cell's source, and what becomes a note."""
    show = cell.metadata.lecture.get("show")
    if cell.cell_type == "markdown":
        blocks = re.split(r"\n\s*\n", cell.source.strip())
        show = range(len(blocks)) if show is None else show
        return ("\n\n".join(blocks[n] for n in show),
                "\n\n".join(block for n, block in enumerate(blocks) if n not in show))
    lines, parts = cell.source.splitlines(), []
    for node in filter(keeps, ast.parse(cell.source).body if show else ()):
        for inner in (node, *getattr(node, "body", ())):
            name = getattr(inner, "name", "")
            if (name if inner is node else f"{node.name}.{name}") in show:
                text = lines[inner.lineno - 1:inner.end_lineno]
                parts.append("\n".join(line[inner.col_offset:] for line in text))
    return "\n\n".join(parts), ""


def outputs_of(cell: NotebookNode) -> list[NotebookNode]:
    """The outputs of a code cell that a slide shows."""
    show, seen, kept = cell.metadata.lecture.get("outputs"), Counter(), []
    for out in cell.outputs:
        kinds = out.get("data", {})
        kind = "image" if "image/png" in kinds else "html" if "text/html" in kinds else "text"
        if show is None or kind in show or f"{kind}:{seen[kind]}" in show:
            kept.append(out)
        seen[kind] += 1
    return kept


def slide_html(section: str, minutes: float, ask: str, cells: list[NotebookNode]) -> str:
    """One <section> for a slide, and one before it for its question."""
    body, note, ask = "", f"<p><b>{minutes:g} min</b></p>", html.escape(ask)
    for cell in cells:
        source, hidden = shown(cell)
        if cell.cell_type == "code":
            cell.outputs = outputs_of(cell)
            cell.metadata.transient = {"remove_source": not source}  # nbconvert's own mark
        elif hidden:
            note += html_of([nbformat.v4.new_markdown_cell(
                re.sub(r"!\[[^]]*\]\([^)]*\)", "", hidden))])
        cell.source = source
        body += html_of([cell])
    body = re.sub(r"<p><em>(?=Figure)", '<p class="caption"><em>', body)
    where = f'<p class="where">{html.escape(section)}</p>'
    question = (f'<section class="ask">{where}<p>{ask}</p><aside class="notes">{note}</aside>'
                "</section>\n" if ask else "")
    where = "" if body.lstrip().startswith("<h") else where
    return (f'{question}<section data-cells="{" ".join(cell.id for cell in cells)}">'
            f'{where}{body}<aside class="notes">{note}</aside></section>')


def make_slides(path: Path, minutes: int) -> str:
    """The deck of the lecture of this many minutes."""
    book = read(path)
    body = "\n".join(slide_html(*slide) for slide in plan(book, minutes))
    return page(book, DECK, f'<div class="reveal"><div class="slides">{body}</div></div>', True)


# ---------------------------------------------------------------- student's copy and script

def make_student(path: Path) -> str:
    """The notebook without solutions, and with exercises that were not run."""
    book = nbformat.read(path, as_version=4)
    book.cells = [c for c in book.cells if "solution" not in c.metadata.get("tags", [])]
    for cell in book.cells:
        if cell.cell_type == "code" and (
                cell.id.endswith("-try") or "exercise" in cell.metadata.get("tags", [])):
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(book) + "\n"


SILENT = """# Written by assets/tools/export.py from the cells of {name}.
import os
import sys
if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
    sys.stdout = open(os.devnull, "w")

"""
WHOLE = {"setup", "choose", "settings"}  # cells that are more than definitions


def make_script(path: Path) -> str:
    """A program of the cells tagged "train", data, settings, and definitions before them."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    train = [n for n, c in enumerate(cells) if "train" in c.metadata.get("tags", [])]
    parts = []
    for number, cell in enumerate(cells[:train[-1] + 1]):
        lines = ["" if line[:1] in ("%", "!") else line for line in cell.source.split("\n")]
        if number in train or cell.id in WHOLE:
            parts.append("\n".join(lines))
        else:
            for node in filter(keeps, ast.parse("\n".join(lines)).body):
                first = min(n.lineno for n in (node, *getattr(node, "decorator_list", ())))
                parts.append("\n".join(lines[first - 1:node.end_lineno]))
    return SILENT.format(name=path.name) + "\n\n".join(parts) + "\n"


def main() -> None:
    """Read the command line, make what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("html", "slides", "lecture", "student", "script"))
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--to", type=Path, help="file to write, else in runs/")
    parser.add_argument("--minutes", type=int, choices=(50, 90), default=50, help="of slides")
    args = parser.parse_args()
    if args.kind == "lecture":
        return print_plan(args.notebook)
    make, name = {"html": (make_html, f"{args.notebook.stem}.html"),
                  "slides": (lambda path: make_slides(path, args.minutes),
                             f"{args.notebook.stem}-{args.minutes}.html"),
                  "student": (make_student, f"{args.notebook.stem}-student.ipynb"),
                  "script": (make_script, "train.py")}[args.kind]
    file = args.to or ROOT / "runs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(make(args.notebook), encoding="utf8")
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
