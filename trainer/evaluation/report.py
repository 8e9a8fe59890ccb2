"""Everything that a benchmark writes: tables, figures and one HTML page that needs no network."""

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import orjson

from trainer.evaluation.claims import Claim, claims, summary
from trainer.evaluation.drawing import FAINT, INK, MUTED, PAPER, NotDrawn, Picture
from trainer.evaluation.figures import draw
from trainer.evaluation.results import BC_ALIGNER, MethodResult, Results, is_variant, pairs
from trainer.evaluation.table import (
    NOTHING,
    PAIR_HEADINGS,
    Line,
    comma_separated,
    conventions,
    document,
    facts,
    headings,
    label,
    lambda_text,
    lines,
    markdown,
    number,
    pair_cells,
)
from trainer.methods import DEFAULT_METHOD


def write_report(results: Results, out: Path, detailed: Sequence[str] | None = None) -> list[Path]:
    """Write the tables, the figures and ``report.html`` into ``out``; return all paths.

    Each file appears whole or not at all, the measurements first: whatever fails later, they are
    there. The methods of ``detailed`` get a heat map and a table of all (k, j) each, at the λ
    nearest to the paper's; BC-Aligner, what is made from it, and the default method where None.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = [_write(out / "results.json", _json(results.document()))]
    methods = _detailed(results, detailed)
    pictures = draw(results, methods)
    files = {
        "table3.md": markdown(results, methods).encode(),
        "table3.csv": comma_separated(results).encode(),
        "table3.json": document(results, methods).encode(),
        **_image_files(pictures),
        "report.html": page(results, methods, pictures).encode(),
    }
    return written + [_write(out / name, content) for name, content in files.items()]


def _detailed(results: Results, names: Sequence[str] | None) -> list[MethodResult]:
    if names is None:
        every = dict.fromkeys(method.name for method in results.methods)
        names = [n for n in every if is_variant(n, BC_ALIGNER) or n == DEFAULT_METHOD]
    return [method for name in names if (method := results.near(name))]


def _image_files(pictures: Iterable[Picture | NotDrawn]) -> dict[str, bytes]:
    drawn = [picture for picture in pictures if isinstance(picture, Picture)]
    return {
        f"{picture.name}.{suffix}": content
        for picture in drawn
        for suffix, content in (("png", picture.png), ("svg", picture.svg))
    }


def _json(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


def _write(path: Path, content: bytes) -> Path:
    """Write under another name, then rename: nobody ever reads half a file."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def page(
    results: Results, detailed: Sequence[MethodResult], pictures: Sequence[Picture | NotDrawn]
) -> str:
    """Return the report as one HTML page: style and figures are inside, and it loads nothing."""
    sections = (
        ("story", "What holds here", _story(results)),
        ("table", "The table", _table(results)),
        ("figures", "Figures", "\n".join(_figure(picture) for picture in pictures)),
        ("pairs", "All pairs of versions", _all_pairs(detailed)),
        ("methods", "Methods and time spent", _methods(results)),
        ("setup", "Configuration and machine", _setup(results)),
    )
    title = escape(f"Backward compatibility on {results.dataset}")
    links = " · ".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in sections)
    body = "\n".join(
        f'<section id="{anchor}">\n<h2>{name}</h2>\n{content}\n</section>'
        for anchor, name, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>
<title>{title}</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{escape(_lead(results))}</p>
<nav>{links}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _lead(results: Results) -> str:
    told = dict(facts(results))
    return (
        f"{told['Data set']}. Preset {results.preset}, protocol {results.protocol}, "
        f"training seeds: {told['Training seeds']}."
    )


def _story(results: Results) -> str:
    items = "\n".join(_claim(claim) for claim in claims(results))
    return f"<p>{escape(_unbroken(summary(results)))}</p>\n<ul>\n{items}\n</ul>"


def _claim(claim: Claim) -> str:
    return (
        f"<li>{escape(_sentence(claim.statement))} <strong>{claim.verdict.capitalize()}</strong>: "
        f"{escape(_unbroken(claim.numbers))}.</li>"
    )


def _unbroken(text: str) -> str:
    """Keep figures, their spread and their unit on one line."""
    for part in (" ± ", " %", " = "):
        text = text.replace(part, part.replace(" ", "\u00a0"))
    return text


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _table(results: Results) -> str:
    body = [_cells(line) for line in lines(results)]
    return "\n".join(
        (
            _grid(
                headings(results),
                body,
                "The best of the rows that keep the latest vectors only is bold",
            ),
            '<details open="open"><summary>What the columns mean</summary>',
            _definitions(conventions(results)),
            "</details>",
        )
    )


def _cells(line: Line) -> list[str]:
    """Return the cells of a row as HTML."""
    measured = [f"<b>{escape(cell.text)}</b>" if cell.best else cell.text for cell in line.cells]
    return [escape(line.title), line.lam, *measured, *map(escape, line.published)]


def _grid(heads: Sequence[str], body: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table of cells that are HTML already; the first of each row is its heading."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    rows = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in body
    )
    return (
        f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0"><table>\n'
        f"<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _definitions(pairs_of_text: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(
        f"<dt>{escape(what)}</dt><dd>{escape(text)}</dd>" for what, text in pairs_of_text
    )
    return f"<dl>\n{rows}\n</dl>"


def _figure(picture: Picture | NotDrawn) -> str:
    if isinstance(picture, NotDrawn):
        return f"<p>Not drawn: {escape(picture.title)}, for {escape(picture.reason)}.</p>"
    return (
        f"<figure>\n<h3>{escape(picture.title)}</h3>\n"
        f'<div class="wide" role="region" aria-label="{escape(picture.title)}" tabindex="0">\n'
        f"{inline_svg(picture)}\n</div>\n"
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_THEMED = {INK: "--ink", MUTED: "--muted", FAINT: "--faint", PAPER: "--paper"}


def inline_svg(picture: Picture) -> str:
    """Return the drawing as an element of a page that may hold others like it.

    Its ids are made its own, its style sheet is left to the page, and what is ink or paper follows
    the page's colours.
    """
    root = ElementTree.fromstring(picture.svg)
    for element in root.iter():
        for child in list(element):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                element.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {
            name.removeprefix(_XLINK): _own(name.removeprefix(_XLINK), value, picture.name)
            for name, value in element.attrib.items()
        }
    width = float(root.attrib["viewBox"].split()[2])
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": picture.title,
        "style": f"--width: {width:g}",
    }
    return ElementTree.tostring(root, encoding="unicode").strip()


def _own(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return f"#{prefix}-{value.removeprefix('#')}"
    value = value.replace("url(#", f"url(#{prefix}-")
    for color, variable in _THEMED.items():
        value = value.replace(color, f"var({variable})")
    return value


def _all_pairs(detailed: Sequence[MethodResult]) -> str:
    if not detailed:
        return f"<p>No table: {BC_ALIGNER} was not run.</p>"
    note = (
        "<p>Live version k, consumers of version j: the mean distance of the served from the true "
        "ver-j vectors, the mean norm of the true ones to read it against, and the singular values "
        "of the map W_k^j, which say how much an error can grow.</p>"
    )
    tables = [
        _grid(
            PAIR_HEADINGS,
            [list(map(escape, pair_cells(pair, len(method.runs)))) for pair in pairs(method)],
            label(method),
        )
        for method in detailed
    ]
    return "\n".join((note, *tables))


def _methods(results: Results) -> str:
    heads = ("method", "λ", "keeps", "training, s", "chosen epochs by k")
    body = [[escape(cell) for cell in _spent(method)] for method in results.methods]
    told = dict.fromkeys((method.title, method.summary) for method in results.methods)
    return "\n".join(
        (
            _definitions(told),
            _grid(heads, body, "Training time of all versions and chosen epochs, means over seeds"),
        )
    )


def _spent(method: MethodResult) -> list[str]:
    seconds = fmean(sum(run.seconds) for run in method.runs)
    epochs = [fmean(chosen) for chosen in zip(*(run.epochs for run in method.runs), strict=True)]
    return [
        method.title,
        lambda_text(method.lam),
        "all vectors" if method.stores_all else "the latest vectors",
        number(seconds, 1),
        ", ".join(f"{epoch:.0f}" for epoch in epochs) or NOTHING,
    ]


def _setup(results: Results) -> str:
    config = [(key, _plain(value)) for key, value in _flat(results.config).items()]
    parts = [_definitions(facts(results))]
    if config:
        parts += ["<h3>Configuration</h3>", _definitions(config)]
    return "\n".join(parts)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #5d6875; --faint: #c9d1d9;
  --paper: #ffffff; --raised: #f5f7f9; --link: #1d5fd0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ed; --muted: #9aa7b4; --faint: #3a444f;
  --paper: #14191f; --raised: #1d242c; --link: #7fb0ff; } }
@media print { :root { color-scheme: light; --ink: #000000; --muted: #444444; --faint: #bbbbbb;
  --paper: #ffffff; --raised: #ffffff; --link: #000000; } nav { display: none; }
  figure, tr { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h2 { margin-top: 2.5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--faint); }
h3 { margin: 2rem 0 .5rem; font-size: 1.05rem; }
a { color: var(--link); }
p, li, figcaption, dd { max-width: 46rem; }
figure { margin: 0; }
figcaption, caption, nav, dd, summary { color: var(--muted); font-size: .9rem; }
.wide { overflow-x: auto; margin: .75rem 0; }
.wide:focus-visible { outline: 2px solid var(--link); }
svg { display: block; width: calc(var(--width) * 1.5px); max-width: 100%;
  min-width: min(calc(var(--width) * 1px), 40rem); height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; text-align: left; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--faint); text-align: right;
  white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; background: var(--raised); }
th:first-child { position: sticky; left: 0; text-align: left; background: var(--raised); }
tbody th { font-weight: normal; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1rem; }
dt { font-size: .9rem; } dd { margin: 0; }
@media (max-width: 36rem) { dl { display: block; } dd { margin-bottom: .5rem; }
  tbody th { white-space: normal; min-width: 7rem; } #pairs tbody th { min-width: 0; } }
"""
