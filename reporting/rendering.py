"""A page as Markdown, as one HTML file, and on the console."""

from __future__ import annotations

import html
import math
import re

from rich import box

from crucible.console import columns, console, fitted, print_table
from reporting.page import Block, Code, Fold, Grid, Heading, Items, Lead, Page, Picture, Text
from reporting.plots import BASELINE_COLOUR, BASELINE_IN_THE_DARK, COLOURS, COLOURS_IN_THE_DARK

# Markdown


def to_markdown(page: Page) -> str:
    """GitHub's Markdown; pictures are linked from plots/."""
    return "\n".join([f"# {page.title}", "", *(line for b in page.blocks for line in [*_markdown(b), ""])])


def _markdown(block: Block) -> list[str]:
    match block:
        case Heading(text, level):
            return [f"{'#' * level} {_plain(text)}"]
        case Text(text, notice):
            return [f"> **Note:** {_marked(text)}" if notice else _line(text)]
        case Lead(answer):
            found = [f"**{_plain(title)}**: {_plain(told)}." for title, told in answer.found]
            return [" ".join([_line(answer.compared), *found])]
        case Items(lines):
            return [f"- {_line(line)}" for line in lines]
        case Code(lines):
            fence = "`" * max(
                3, 1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
            )
            return [f"{fence}sh", *lines, fence]
        case Grid(head, rows, words):
            rule = ["---" if name in words else "---:" for name in head]
            cells = [list(head), rule, *([shown for shown, _ in row] for row in rows)]
            return [
                "| " + " | ".join(c if line is rule else _plain(c).replace("|", "\\|") for c in line) + " |"
                for line in cells
            ]
        case Picture(plot, file):
            title = _plain(plot.title)
            return [f"![{title}]({file})", "", f"*{title}.* {_marked(plot.caption)}"]
        case Fold(title, blocks):
            inner = [line for b in blocks for line in [*_markdown(b), ""]]
            return [f"<details><summary>{_in_html(title)}</summary>", "", *inner, "</details>"]


_MARKS = re.compile(
    r"`[^`]+`|(?<![\w*])\*[A-Za-z][^*<]*\*(?![\w*])"
)  # `code` and *emphasis*, as in `_inline`
# what GitHub would take for a mark: of code, emphasis, HTML, an entity, a link
_MARK = re.compile(
    r"[`\\]|\*(?=\S)|(?<=\S)\*|(?<!\w)_|_(?!\w)|~(?=~)|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\[(?=[^]]*\]\s*[(:\[])|\]\s*(?=[(:\[])"
)
_LINK = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp)(?=:)|\bwww(?=\.)|(?<=\w)@(?=\w)")


def _plain(text: str) -> str:
    """A text that shows as it is: on one line, none of it a mark or a link."""
    text = _MARK.sub(
        lambda m: {"<": "&lt;", "&": "&amp;"}.get(m[0], f"\\{m[0]}"), " ".join(text.splitlines())
    )
    return _without_links(text)


def _without_links(text: str) -> str:
    return _LINK.sub(lambda m: f"{m[0][:-1]}&#{ord(m[0][-1])};", text)


def _in_html(text: str) -> str:
    """The same within a line of HTML, where a backslash is one."""
    return _without_links(_escape(" ".join(text.splitlines()))).replace("[", "&#91;")


def _marked(text: str) -> str:
    """Plain but for `code` and *emphasis*."""
    text, parts, end = " ".join(text.splitlines()), [], 0
    for match in _MARKS.finditer(text):
        inner = match[0] if match[0][0] == "`" else f"*{_plain(match[0][1:-1])}*"
        parts += [_plain(text[end : match.start()]), inner]
        end = match.end()
    return "".join([*parts, _plain(text[end:])])


def _line(text: str) -> str:
    """A paragraph or an item: its beginning is no mark of a heading, a list or a quotation."""
    return re.sub(r"^(\s*)(?=[#>+=|-])|^(\s*\d+)(?=[.)]\s)", lambda m: f"{m[0]}\\", _marked(text))


# HTML


def to_html(page: Page) -> str:
    """One file with its style, script and pictures in it."""
    body = "\n".join(block_to_html(block) for block in page.blocks)
    return document(page.title, f"<main>\n<h1>{_escape(page.title)}</h1>\n{body}\n</main>")


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole file of what its body shows; `style` and `script` come after the page's own."""
    light, dark = (
        ";".join(f"--arm{i}:{colour}" for i, colour in enumerate(colours))
        for colours in ((BASELINE_COLOUR, *COLOURS), (BASELINE_IN_THE_DARK, *COLOURS_IN_THE_DARK))
    )
    own = f"{_STYLE}:root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<style>{own}{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{_SCRIPT}{script}</script>\n</body>\n</html>\n"
    )


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _inline(text: str) -> str:
    """Escaped, with `code` and *emphasis*."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))
    return re.sub(r"(?<![\w*])\*([A-Za-z][^*<]*)\*(?![\w*])", r"<em>\1</em>", marked)


def _verdict_class(text: str) -> str:
    openings = (
        "helps",
        "hurts",
        "no difference",
        "no technique",
        "undecided",
        "unstable",
        "cannot say",
        "open",
        "stopped",
        "synergy",
        "conflict",
    )
    opening = next((o for o in openings if text.startswith(o)), "")
    return f' class="verdict {opening.split()[0]}"' if opening else ""


def block_to_html(block: Block) -> str:
    """A block of a page."""
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escape(text)}</h{level}>"
        case Text(text, notice):
            return f'<p class="notice">{_inline(text)}</p>' if notice else f"<p>{_inline(text)}</p>"
        case Lead(answer):
            found = "".join(
                f"<p><b{_verdict_class(title.lower())}>{_escape(title)}</b>: {_escape(told)}.</p>"
                for title, told in answer.found
            )
            return f'<div class="lead"><p>{_escape(answer.compared)}</p>{found}</div>'
        case Items(lines):
            return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>"
        case Code(lines):
            return "<pre><code>" + "\n".join(map(_escape, lines)) + "</code></pre>"
        case Grid():
            return _html_grid(block)
        case Picture(plot):
            caption = f"<figcaption><b>{_escape(plot.title)}.</b> {_escape(plot.caption)}</figcaption>"
            return f'<figure><div class="scroll">{plot.svg}</div>{caption}</figure>'
        case Fold(title, blocks):
            inner = "\n".join(map(block_to_html, blocks))
            return f"<details><summary>{_escape(title)}</summary>\n{inner}\n</details>"


def _html_grid(grid: Grid) -> str:
    head = "".join(
        f'<th scope="col"{"" if name in grid.words else " class=number"} aria-sort="none">'
        f'<button type="button">{_escape(name)}</button></th>'
        for name in grid.head
    )
    lines = []
    for row in grid.rows:
        cells = []
        for i, (name, (shown, key)) in enumerate(zip(grid.head, row, strict=True)):
            text = (
                f"<span{_verdict_class(shown)}>{_escape(shown)}</span>"
                if name in ("verdict", "verdict, corrupted", "so")
                else _escape(shown)
            )
            if i == 0:  # long names may break where they have a joint
                text = re.sub(r"([_+=,/]|\.(?=[a-z]))", r"\1<wbr>", text)
            value = "" if isinstance(key, float) and math.isnan(key) else _escape(str(key))
            css_class = "" if name in grid.words else " class=number"
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
            cells.append(f'<{tag}{scope}{css_class} data-key="{value}">{text}</{tag}>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--shade:#f6f8fa;
--good:#1a7f37;--bad:#cf222e;--open:#9a6700;--link:#0969da}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;
--shade:#161b22;--good:#3fb950;--bad:#ff7b72;--open:#d29922;--link:#4493f8}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
main{max-width:68rem;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.7rem;margin:.5rem 0}
h2{font-size:1.35rem;margin:2.2rem 0 .5rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
h3{font-size:1.08rem;margin:1.8rem 0 .5rem}
p,li{max-width:48rem}
ul{padding-left:1.25rem}
code,pre{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--shade);border-radius:4px}
code{padding:.1em .3em;overflow-wrap:anywhere}
pre{padding:.7rem .9rem;overflow-x:auto}
pre code{padding:0;background:none;overflow-wrap:normal}
.notice{border-left:4px solid var(--open);background:var(--shade);padding:.5rem .8rem;border-radius:0 4px 4px 0}
.lead{border-left:4px solid var(--link);padding:.1rem 0 .1rem 1rem;margin:.8rem 0;max-width:52rem}
.lead p{margin:.45rem 0;max-width:none}
.lead b.verdict.no,.lead b.verdict.cannot{color:inherit}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .65rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;white-space:nowrap}
td .verdict,td:last-child{white-space:normal}
td:last-child:not(.number){min-width:11rem}
td .verdict{display:inline-block;min-width:13rem}
.number{text-align:right}
thead th{padding:0;background:var(--shade)}
thead button{all:unset;display:block;box-sizing:border-box;width:100%;padding:.35rem .65rem;cursor:pointer;
font-weight:600}
thead button:focus-visible{outline:2px solid var(--link);outline-offset:-2px}
thead button::after{content:"\\2195";margin-left:.3em;color:var(--soft);opacity:.45;font-weight:400}
th[aria-sort=ascending] button::after{content:"\\2191";opacity:1}
th[aria-sort=descending] button::after{content:"\\2193";opacity:1}
tbody th{font-weight:600;position:sticky;left:0;background:var(--page);white-space:normal;min-width:9rem}
.verdict.helps,.verdict.synergy{color:var(--good);font-weight:600}
.verdict.hurts,.verdict.conflict,.verdict.unstable{color:var(--bad);font-weight:600}
.verdict.undecided,.verdict.cannot,.verdict.open,.verdict.stopped{color:var(--open)}
figure{margin:1.2rem 0}
figure svg{display:block;width:100%;max-width:37rem;height:auto;font-family:inherit}
figcaption{color:var(--soft);font-size:.9rem;max-width:48rem;margin-top:.3rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--link)}
@media (max-width:40rem){body{font-size:15px}main{padding:.5rem .75rem 3rem}th,td{padding:.3rem .5rem}
thead button{padding:.35rem .5rem}td .verdict{min-width:0;width:9.5rem}
tbody th{min-width:6rem}td:last-child:not(.number){min-width:6rem}}
@media print{thead button::after{content:""}figure{break-inside:avoid}}
"""

_SCRIPT = """
const sortable = root => { for (const table of root.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = head.classList.contains("number"), key = row => row.cells[column].dataset.key;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, {numeric: true});
      return down ? -order : order;
    });
    body.append(...rows);
  }));
} };
sortable(document);
"""


# The console


def to_console(page: Page) -> None:
    """Print what the page says in brief: verdicts, tables, notes, warnings."""
    screen, width = console(), columns()
    for block in page.brief:
        match block:
            case Heading(text):
                screen.print(f"\n{fitted(text, width)}", style="bold")
            case Text(text):
                screen.print(fitted(text, width), soft_wrap=True)
            case Lead(answer):
                for line in (answer.compared, *(f"{title}: {told}." for title, told in answer.found)):
                    screen.print(fitted(line, width), soft_wrap=True)
            case Items(lines):
                for line in lines:
                    screen.print(fitted(f"  - {line}", width), soft_wrap=True)
            case Grid(head, rows, words):
                shown = [[text for text, _ in row] for row in rows]
                print_table(head, shown, words, style=box.SIMPLE_HEAD)
