"""Web page, slides, lecture plan, student's copy, script of a notebook. By hand, seconds:

    python assets/tools/export.py html diffusion_tutorial.ipynb
    python assets/tools/export.py slides diffusion_tutorial.ipynb --minutes 50
    python assets/tools/export.py lecture diffusion_tutorial.ipynb
    python assets/tools/export.py student diffusion_tutorial.ipynb
    python assets/tools/export.py script diffusion_tutorial.ipynb

Page and slides are one file each and fetch nothing when they are shown: KaTeX turns the
formulas into HTML, reveal.js is written into the deck (both by npm, while exporting).

The script, for torchrun, holds the cells tagged "train", the data, the settings, and the
definitions of all cells before them.

A lecture path lives in the metadata of its cells. Every cell of a path has

    "slideshow": {"slide_type": "slide"}    as Jupyter knows it: slide, subslide, fragment,
                                            "-" (on the same slide), notes or skip
    "lecture": {"paths": [50, 90],          the lectures, in minutes, that show this cell
                "minutes": 2,               of this slide (slide and subslide only)
                "ask": "...",               a question for the room, on a slide before
                "show": [0, 2],             prose: its paragraphs, counted from 0; the others
                                            become speaker notes. Code: names of functions
                                            and classes. "all": everything. Without it
                                            prose is shown and code is not
                "outputs": ["image"]}       of a code cell: "image", "text", "html", "gif", or
                                            "image:0", the first of them; without it all
"""
import argparse
import ast
import base64
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from jinja2 import pass_context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"katex": "0.19.1", "reveal.js": "6.0.2"}
LIMIT = 12_000_000  # bytes of an exported page
DEAD = ("This control needs a running notebook. The pictures around it tell the story"
        " without it.")
POLICY = ("default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline';"
          " script-src 'unsafe-inline'; frame-src 'self' file:")  # so browsers fetch nothing

COMMON = """
.highlight { background: #f6f7f9; } .highlight pre { margin: 0; }
pre, code { font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; }
img { max-width: 100%; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; }
th, td { padding: .25em .8em; border-bottom: 1px solid #cfd4da; }
.katex-display { margin: .6em 0; }
.dead { border-left: 4px solid #E69F00; padding: .3em .8em; background: #fdf6e7; }
"""
PAGE = """
body { max-width: 960px; margin: 2rem auto; padding: 0 1.5rem; color: #1a1d21;
  font: 18px/1.55 "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; }
h1, h2, h3 { line-height: 1.2; margin: 1.8em 0 .6em; } h1 { font-size: 2rem; }
h2 { border-top: 1px solid #cfd4da; padding-top: 1em; }
a { color: #0072B2; } code { font-size: .88em; background: #f1f3f5; padding: 0 .2em; }
pre code { background: none; } table { font-size: .92em; }
.highlight { border-left: 4px solid #0072B2; }
.highlight pre, .output_text pre { font-size: 14px; line-height: 1.4; padding: .6em .9em;
  overflow-x: auto; margin: .5em 0 0; }
.output_text pre { border-left: 4px solid #cfd4da; }
.output_subarea { margin: .6em 0; overflow-x: auto; } .katex-display { overflow-x: auto; }
input[type=range], button, select { font-size: 1rem; vertical-align: middle; }
details { margin-bottom: .6em; }
@media print { .highlight pre { white-space: pre-wrap; } }
"""
DECK = """
html, body { background: #fff; }
.reveal .slides { text-align: left; color: #1a1d21; line-height: 1.35;
  font-family: "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; }
.reveal .slides section { --k: 1; font-size: calc(30px * var(--k)); height: 720px;
  padding: 26px 48px 34px; box-sizing: border-box; }
.reveal h1, .reveal h2, .reveal h3 { line-height: 1.15; margin: 0 0 .45em; color: #0b3a5b; }
.reveal h1 { font-size: 1.65em; } .reveal h2 { font-size: 1.4em; }
.reveal h3 { font-size: 1.2em; }
.reveal p, .reveal ul, .reveal ol { margin: 0 0 .5em; }
.reveal ul, .reveal ol { padding-left: 1.2em; display: block; }
.reveal table { font-size: .8em; margin: 0 0 .5em; } .reveal a { color: #0072B2; }
.reveal code { font-size: .88em; } .reveal td .katex { white-space: nowrap; }
.reveal .highlight { border-left: 5px solid #0072B2; margin-bottom: .4em; }
.reveal .highlight pre, .reveal .output_text pre { padding: .4em .6em; margin: 0;
  line-height: 1.3; font-size: calc(21px * var(--k)); white-space: pre; overflow: hidden; }
.reveal strong, .reveal b, .reveal th { font-weight: bold; }
.reveal em, .reveal i { font-style: italic; }
.reveal p.where { font-size: 18px; color: #66717c; margin: -10px 0 .5em; }
.reveal .output_text pre { border-left: 5px solid #cfd4da; margin-bottom: .4em; }
.reveal .output_subarea, .reveal p:has(> img) { text-align: center; }
.reveal .output_text { text-align: left; }
.reveal img { margin: 0 auto .2em; display: block; max-width: none; }
.reveal .caption { font-size: .8em; color: #444c55; }
.reveal :is(.frames, .film) input, .reveal .frames button, .reveal select { font-size: .8em;
  vertical-align: middle; } .reveal :is(.frames, .film) input { width: 560px !important; }
.reveal :is(.frames, .film) { margin-bottom: .6em; }
.reveal :is(.frames, .film) output { display: inline-block; min-width: 6em; text-align: left; }
.reveal section.ask { background: #0b3a5b; color: #fff; padding: 200px 110px 60px; }
.reveal section.ask p { font-size: 1.6em; line-height: 1.3; }
.reveal section.ask p.where { font-size: .9em; color: #b9d4e6; margin: 0 0 .6em; }
.reveal .slide-number { font-size: 16px; background: none; color: #66717c; top: 8px;
  bottom: auto; }
"""
FIT = """
const W = 1280, H = 720, MARGIN = 40;
function tooLarge(s) {
  const box = s.getBoundingClientRect();
  return s.scrollHeight > H || [...s.querySelectorAll('pre, table, img, .katex-base, p, li')]
    .some(e => { const r = e.getBoundingClientRect();
      return r.right > box.left + W - MARGIN || r.bottom > box.top + H - MARGIN / 2
        || e.tagName == 'PRE' && e.scrollWidth > e.clientWidth; });
}
function fit(s) {  // the largest type and pictures that the slide has room for
  s.style.display = 'block';
  const seen = [...s.querySelectorAll('img')].filter(i => i.style.display != 'none');
  const stacks = seen.map(i => [...(i.closest('.frames, .film')
    || {querySelectorAll: () => [i]}).querySelectorAll('img')]);
  const shape = seen.map(i => { const r = i.getBoundingClientRect();
    return [r.width / r.height, i.closest('.frames, .film') ? W : 1.6 * i.naturalWidth]; });
  for (let k = 1.2; k > 0.3; k -= 0.02) {
    s.style.setProperty('--k', k.toFixed(2));
    const height = 620 * Math.min(k, 1) ** 3 / Math.max(1, seen.length);
    seen.forEach((_, n) => stacks[n].forEach(i => { i.style.height = 'auto';
      i.style.width = Math.min(W - 110, height * shape[n][0], shape[n][1]) + 'px'; }));
    if (!tooLarge(s)) break;
  }
  s.style.display = '';
}
addEventListener('load', async () => {
  await Promise.all([...document.fonts].map(font => font.load()));
  document.querySelectorAll('.slides > section').forEach(fit);
  Reveal.initialize({width: W, height: H, margin: 0, center: false, hash: true,
    slideNumber: 'c/t', controls: false, transition: 'none', navigationMode: 'linear',
    plugins: [RevealNotes]});
});
"""
NODE = """
const katex = require('katex');
const jobs = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const made = jobs.map(([tex, displayMode, output]) => {
  try { return katex.renderToString(tex, {displayMode, output, strict: false}); }
  catch (error) { console.error(tex); process.exit(3); }
});
process.stdout.write(JSON.stringify(made));
"""


class Refusal(Exception):
    """A mistake that the caller can mend; its text is one sentence."""


def check(ok: bool, sentence: str) -> None:
    """Raise Refusal with one sentence, unless ok."""
    if not ok:
        raise Refusal(sentence)


def read(path: Path) -> NotebookNode:
    """The notebook at path, valid."""
    check(path.is_file(), f"there is no notebook {path}.")
    try:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
    except Exception as error:  # broken JSON, wrong JSON, invalid notebook: many kinds
        raise Refusal(f"{path} is not a valid notebook ({type(error).__name__}).") from None
    return book


# ---------------------------------------------------------------- npm and formulas

def install(folder: Path) -> Path:
    """KaTeX and reveal.js from the npm registry in folder; returns its node_modules."""
    check(bool(shutil.which("npm") and shutil.which("node")),
          "npm and node are needed to export a page or slides: install Node.js.")
    names = [f"{name}@{version}" for name, version in PACKAGES.items()]
    done = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts",
                           "--prefer-offline", "--prefix", str(folder), *names],
                          capture_output=True, text=True)
    check(done.returncode == 0, f"npm could not install {' and '.join(names)}: "
          + (done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return folder / "node_modules"


class Formulas:
    """Formulas found while prose is turned into HTML, and their HTML in the end."""

    def __init__(self) -> None:
        """None yet."""
        self.jobs: list[tuple[str, bool, str]] = []
        self.output = "htmlAndMathml"  # or "mathml", which needs no style sheet

    def add(self, tex: str, block: bool) -> str:
        """Remember a formula; returns the mark that stands for it until fill."""
        self.jobs.append((tex.strip(), block, self.output))
        return f"FORMULA{len(self.jobs) - 1}Q"

    def fill(self, text: str, modules: Path) -> str:
        """text with each mark replaced by what KaTeX makes of its formula."""
        done = subprocess.run(["node", "-e", NODE], input=json.dumps(self.jobs), text=True,
                              capture_output=True, cwd=modules.parent)
        check(done.returncode == 0,
              f"KaTeX cannot read the formula {done.stderr.strip()[:200]}")
        made = json.loads(done.stdout)
        return re.sub(r"FORMULA(\d+)Q", lambda m: made[int(m[1])], text)


def katex_css(modules: Path) -> str:
    """KaTeX's style sheet with its fonts (woff2) inside."""
    folder = modules / "katex/dist"
    css = (folder / "katex.min.css").read_text()
    css = re.sub(r",url\([^)]*\.(?:woff|ttf)\) format\(\"[a-z]+\"\)", "", css)
    return re.sub(r"url\((fonts/[^)]*\.woff2)\)", lambda m: "url(data:font/woff2;base64,"
                  + base64.b64encode((folder / m[1]).read_bytes()).decode() + ")", css)


# ---------------------------------------------------------------- cells to HTML

class Prose(IPythonRenderer):
    """nbconvert's renderer of Markdown, with formulas handed to Formulas."""

    def __init__(self, formulas: Formulas, **options: object) -> None:
        """options: as nbconvert's renderer has them."""
        super().__init__(escape=False, embed_images=True, exclude_anchor_links=True,
                         **options)
        self.formulas = formulas

    def block_math(self, body: str) -> str:
        """A displayed formula."""
        return self.formulas.add(body, True)

    def inline_math(self, body: str) -> str:
        """A formula in the text."""
        return self.formulas.add(body, False)

    def latex_environment(self, name: str, body: str) -> str:
        """A LaTeX environment, displayed."""
        return self.formulas.add(rf"\begin{{{name}}}{body}\end{{{name}}}", True)


class Exporter(HTMLExporter):
    """nbconvert's HTML of cells, without page around it and without any script."""

    def __init__(self, formulas: Formulas, folder: Path) -> None:
        """folder: where pictures that the prose names are looked for."""
        self.formulas, self.folder = formulas, folder
        super().__init__(template_name="basic", exclude_input_prompt=True,
                         exclude_output_prompt=True)

    @pass_context
    def markdown2html(self, context: dict, source: str) -> str:
        """Markdown to HTML; context holds the cell and its attachments."""
        attachments = context.get("cell", {}).get("attachments", {})
        prose = Prose(self.formulas, attachments=attachments, path=str(self.folder))
        return MarkdownWithMath(renderer=prose).render(source)

    def cells(self, cells: list[NotebookNode]) -> str:
        """The HTML of some cells."""
        return self.from_notebook_node(nbformat.from_dict({
            "cells": cells, "nbformat": 4, "nbformat_minor": 5,
            "metadata": {"language_info": {"name": "python"}}}))[0]


def still(output: NotebookNode, caption: str) -> NotebookNode:
    """An output as a page without kernel can show it, its pictures with a description."""
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        output.data = {"text/html": f'<p class="dead">{DEAD}</p>'}
    elif "image/gif" in data:  # nbconvert knows no GIF
        output.data = {"text/html": f'<img alt="{html.escape(caption)}" '
                       f'src="data:image/gif;base64,{data["image/gif"].strip()}">'}
    for kind in ("image/png", "image/jpeg"):
        if kind in output.get("data", {}):
            output.metadata.setdefault(kind, {}).setdefault("alt", caption)
    return output


def wanted(cell: NotebookNode) -> list[NotebookNode]:
    """The outputs of a code cell that a slide shows."""
    counts, kept = {}, []
    show = cell.metadata.get("lecture", {}).get("outputs")
    for output in cell.outputs:
        kinds = [*output.get("data", {"text/": ""})]
        kind = next((name for name, start in (("gif", "image/gif"), ("image", "image/"),
                                              ("html", "text/html"), ("text", ""))
                     if any(k.startswith(start) for k in kinds)))
        number = counts[kind] = counts.get(kind, -1) + 1
        if show is None or kind in show or f"{kind}:{number}" in show:
            kept.append(output)
    check(bool(kept) or not show, f"cell {cell.id} has no output {show}: run the notebook,"
          ' or mend "outputs" in its metadata.')
    return kept


def prepare(book: NotebookNode, lecture: bool = False) -> NotebookNode:
    """The notebook with outputs that need no kernel; those for slides only, or all."""
    for number, cell in enumerate(book.cells):
        below = book.cells[number + 1].source if number + 1 < len(book.cells) else ""
        caption = re.sub(r"[*$\\`]", "", re.split(r"(?<=[a-z)])\. |\n", below)[0])
        if cell.cell_type == "code":
            kept = wanted(cell) if lecture else cell.outputs
            cell.outputs = [still(out, caption or "output of the cell") for out in kept
                            if out.get("name") != "stderr"]
    return book


def page(title: str, style: str, body: str, script: str = "") -> str:
    """One HTML document that holds all it needs."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{style}</style></head>\n"
            f"<body>{body}{script}</body></html>\n")


def title_of(book: NotebookNode) -> str:
    """The first heading."""
    found = re.search(r"^# (.+)$", "\n".join(c.source for c in book.cells
                                           if c.cell_type == "markdown"), re.M)
    return found[1] if found else "Notebook"


def make_html(path: Path) -> str:
    """The whole notebook as one page."""
    book, formulas = prepare(read(path)), Formulas()
    body = Exporter(formulas, path.parent).cells(book.cells)
    body = re.sub(r'(href="[\w-]+)\.ipynb', r"\1.html", body)
    with tempfile.TemporaryDirectory() as folder:
        modules = install(Path(folder))
        style = COMMON + PAGE + HtmlFormatter().get_style_defs(".highlight")
        return page(title_of(book), katex_css(modules) + style,
                    formulas.fill(body, modules))


# ---------------------------------------------------------------- the lecture

@dataclass
class Slide:
    """One slide of a path: its cells, its minutes and its question."""

    section: str
    minutes: float
    ask: str = ""
    cells: list[NotebookNode] = field(default_factory=list)

    @property
    def names(self) -> str:
        """The ids of its cells."""
        return " ".join(cell.id for cell in self.cells)


def plan(book: NotebookNode, minutes: int) -> list[Slide]:
    """The slides of the path of this many minutes."""
    slides, section = [], ""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^#{1,2} (.+)$", cell.source, re.M):
                section = heading
        lecture = cell.metadata.get("lecture", {})
        kind = cell.metadata.get("slideshow", {}).get("slide_type", "-")
        if minutes not in lecture.get("paths", []) or kind == "skip":
            continue
        if kind in ("slide", "subslide"):
            check("minutes" in lecture, f"cell {cell.id} begins a slide without minutes.")
            slides.append(Slide(section, lecture["minutes"], lecture.get("ask", "")))
        check(bool(slides), f"cell {cell.id} comes before the first slide.")
        check(kind in ("slide", "subslide") or "minutes" not in lecture,
              f"cell {cell.id} has minutes, but begins no slide.")
        slides[-1].cells.append(cell)
    known = sorted({p for c in book.cells for p in c.metadata.get("lecture", {})
                    .get("paths", [])})
    check(bool(slides), f"there is no lecture of {minutes} minutes in the cells' metadata; "
          + (f"known are {known}." if known else "no cell has any."))
    return slides


def make_plan(path: Path) -> str:
    """All lecture paths as tables."""
    book, lines = read(path), []
    paths = sorted({p for c in book.cells for p in c.metadata.get("lecture", {})
                    .get("paths", [])})
    check(bool(paths), f"{path} has no lecture in its cells' metadata.")
    for minutes in paths:
        lines += [f"{title_of(book)}: {minutes} minutes", ""]
        slides, at = plan(book, minutes), 0
        for number, slide in enumerate(slides, 1):
            lines.append(f"{number:3}  {at:5.1f}  {slide.minutes:4.1f} min  "
                         f"{slide.section[:34]:34}  {slide.names}")
            if slide.ask:
                lines.append(f"{'':18} ask: {slide.ask}")
            at += slide.minutes
        lines += [f"     {at:5.1f}  minutes in all, {len(slides)} slides, "
                  f"{sum(bool(s.ask) for s in slides)} questions", ""]
    return "\n".join(lines)


def chosen_prose(cell: NotebookNode) -> tuple[str, str]:
    """What the slide shows of a markdown cell, and what becomes a note."""
    show = cell.metadata.lecture.get("show", "all")
    blocks = re.split(r"\n\s*\n", cell.source.strip())
    if cell.metadata.get("slideshow", {}).get("slide_type") == "notes":
        return "", cell.source
    if show == "all":
        return cell.source, ""
    check(all(n < len(blocks) for n in show), f"cell {cell.id} has {len(blocks)} paragraphs:"
          f' its metadata "show" names {show}, counted from 0.')
    rest = [block for n, block in enumerate(blocks) if n not in show]
    return "\n\n".join(blocks[n] for n in show), "\n\n".join(rest)


def chosen_code(cell: NotebookNode) -> str:
    """What the slide shows of the source of a code cell."""
    show = cell.metadata.lecture.get("show", [])
    if show == "all":
        return cell.source
    lines, parts, known = cell.source.splitlines(), [], {}
    for node in ast.parse(cell.source).body:
        for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                name = inner.name if inner is node else f"{node.name}.{inner.name}"
                first = min([inner.lineno, *(d.lineno for d in inner.decorator_list)])
                known[name] = (first - 1, inner.end_lineno)
    for name in show:
        check(name in known, f"cell {cell.id} defines {sorted(known)}, not {name}.")
        text = "\n".join(lines[slice(*known[name])])
        indent = len(text) - len(text.lstrip())
        parts.append("\n".join(line[indent:] for line in text.splitlines()))
    return "\n\n".join(parts)


def cell_html(cell: NotebookNode, exporter: Exporter) -> tuple[str, str]:
    """The HTML of one cell on a slide, and of what it adds to the notes."""
    cell, formulas, note = cell.copy(), exporter.formulas, ""
    if cell.cell_type == "markdown":
        cell.source, hidden = chosen_prose(cell)
        if hidden:
            formulas.output = "mathml"
            note = exporter.cells([nbformat.v4.new_markdown_cell(
                re.sub(r"!\[[^]]*\]\([^)]*\)", "", hidden), id=f"{cell.id}-note")])
            formulas.output = "htmlAndMathml"
    else:
        cell.source = chosen_code(cell)
        if not cell.source:  # nbconvert's own mark for "no input"
            cell.metadata = cell.metadata | {"transient": {"remove_source": True}}
    body = exporter.cells([cell]) if cell.source or cell.cell_type == "code" else ""
    body = re.sub(r"<p><em>(?=Figure)", '<p class="caption"><em>', body)
    if cell.metadata.get("slideshow", {}).get("slide_type") == "fragment":
        body = f'<div class="fragment">{body}</div>'
    return body, note


def slide_html(slide: Slide, exporter: Exporter) -> str:
    """One <section> for a slide, and one before it for its question."""
    bodies, notes = zip(*(cell_html(cell, exporter) for cell in slide.cells))
    seconds, parts = round(60 * slide.minutes), []
    about = f"<p><b>{slide.minutes:g} min</b></p>"
    if slide.ask:
        ask = html.escape(slide.ask)
        parts.append(
            f'<section class="ask" data-timing="{seconds // 3}"><p class="where">'
            f"{html.escape(slide.section)}</p><p>{ask}</p><aside class=\"notes\">{about}"
            f"<p>Ask: {ask}</p></aside></section>")
        about += f"<p>Asked: {ask}</p>"
        seconds -= seconds // 3
    where = f'<p class="where">{html.escape(slide.section)}</p>'
    where = "" if re.search("<h[1-3]", bodies[0]) else where
    parts.append(f'<section data-timing="{seconds}" data-cells="{slide.names}">'
                 f'{where}{"".join(bodies)}<aside class="notes">{about}{"".join(notes)}</aside>'
                 "</section>")
    return "\n".join(parts)


def make_slides(path: Path, minutes: int) -> str:
    """The deck of the lecture path of this many minutes."""
    book, formulas = prepare(read(path), True), Formulas()
    exporter = Exporter(formulas, path.parent)
    body = "\n".join(slide_html(slide, exporter) for slide in plan(book, minutes))
    body = f'<div class="reveal"><div class="slides">{body}</div></div>'
    with tempfile.TemporaryDirectory() as folder:
        modules = install(Path(folder))
        reveal = modules / "reveal.js/dist"
        styles = [reveal / "reset.css", reveal / "reveal.css"]
        style = "".join(file.read_text() for file in styles) + katex_css(modules)
        style += COMMON + DECK + HtmlFormatter().get_style_defs(".highlight")
        scripts = [file.read_text() for file in
                   (reveal / "reveal.js", reveal / "plugin/notes.js")] + [FIT]
        script = "".join("<script>" + s.replace("</script", r"<\/script") + "</script>"
                         for s in scripts)
        return page(f"{title_of(book)}, {minutes} minutes", style,
                    formulas.fill(body, modules), script)


# ---------------------------------------------------------------- the student's copy

def make_student(path: Path) -> str:
    """The notebook without cells tagged "solution", and with exercises that were not run.

    An exercise is a code cell tagged "exercise", or one whose id ends in -try.
    """
    book = read(path)
    tags = [cell.metadata.get("tags", []) for cell in book.cells]
    book.cells = [c for c, own in zip(book.cells, tags) if "solution" not in own]
    for cell in book.cells:
        mine = cell.id.endswith("-try") or "exercise" in cell.metadata.get("tags", [])
        if mine and cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    print(f"{sum('solution' in own for own in tags)} solutions taken out")
    nbformat.validate(book)
    return nbformat.writes(book) + "\n"


# ---------------------------------------------------------------- a script for torchrun

SILENT = """# Written by assets/tools/export.py from the cells of {name}.
import os
import sys
if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
    sys.stdout = open(os.devnull, "w")

"""
WHOLE = {"setup", "choose", "settings"}  # cells that are more than definitions


def definitions(source: str) -> str:
    """Imports, functions, classes and assignments to Capitalised names of a cell."""
    lines, kept = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) or (
                isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id[0].isupper()):
            first = min([node.lineno, *(d.lineno for d in getattr(
                node, "decorator_list", []))])
            kept.append("\n".join(lines[first - 1:node.end_lineno]))
    return "\n\n".join(kept)


def make_script(path: Path) -> str:
    """A program of the cells tagged "train", data, settings, and definitions before them."""
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    train = [n for n, c in enumerate(cells) if "train" in c.metadata.get("tags", [])]
    check(bool(train), f'no cell of {path} has the tag "train".')
    parts = []
    for number, cell in enumerate(cells[:train[-1] + 1]):
        source = "\n".join(line for line in cell.source.split("\n") if line[:1] not in "%!#"
                           or not line)
        parts.append(source if number in train or cell.id in WHOLE else definitions(source))
    return SILENT.format(name=path.name) + "\n\n".join(filter(None, parts)) + "\n"


def write(text: str, file: Path) -> None:
    """Write a file and say where and how large it is."""
    size = len(text.encode())
    check(size <= LIMIT, f"{file} would have {size / 1e6:.1f} MB, more than"
          f" {LIMIT / 1e6:.0f}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf8")
    print(f"{file}: {size / 1e6:.1f} MB")


def main() -> None:
    """Read the command line, make what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, what in (("html", "one page that works offline"),
                       ("slides", "a slide deck that works offline"),
                       ("lecture", "print the lecture paths as tables"),
                       ("student", "a copy without solutions"),
                       ("script", 'the cells tagged "train", for torchrun')):
        sub = kinds.add_parser(kind, help=what)
        sub.add_argument("notebook", type=Path)
        if kind != "lecture":
            sub.add_argument("--to", type=Path, help="file to write, else in runs/")
        if kind == "slides":
            sub.add_argument("--minutes", type=int, required=True, help="50 or 90")
    args = parser.parse_args()
    try:
        if args.kind == "lecture":
            print(make_plan(args.notebook))
            return
        make: dict[str, tuple[Callable, str]] = {
            "html": (make_html, ".html"), "student": (make_student, "-student.ipynb"),
            "script": (make_script, ""),
            "slides": (lambda path: make_slides(path, args.minutes),
                       f"-{getattr(args, 'minutes', '')}.html")}
        function, ending = make[args.kind]
        name = "train.py" if args.kind == "script" else args.notebook.stem + ending
        write(function(args.notebook), args.to or ROOT / "runs" / name)
    except (Refusal, OSError) as error:
        sys.exit(f"export.py: {error}")


if __name__ == "__main__":
    main()
