"""Make README.md from nbs/index.ipynb: the same words and tables, with links that work anywhere.

    python scripts/readme.py [--check]

`--check` changes nothing, and fails where README.md isn't what the notebook gives.
"""

import re
from html import unescape
from pathlib import Path

from fastcore.nbio import NbCell
from fastcore.xtras import working_directory
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_line, strip_ansi

from links import ROOT, absolute, address, made_file

HIDDEN = {"hide", "default_exp"}


def shown(path: Path) -> list[NbCell]:
    """The cells of the notebook that a reader sees on a page: without hidden cells, directives and
    housekeeping magics. A cell whose code is hidden has an empty source, one whose outputs are
    hidden has none."""
    nb, res = NBProcessor(path, [hide_line, strip_ansi, clean_magics]), []
    with working_directory(ROOT):
        nb.process()
    for cell in nb.nb.cells:
        d = cell.directives_
        if HIDDEN & set(d) or d.get("include") == "false":
            continue
        if "hide_input" in d or d.get("echo") == "false":
            cell.source = ""
        if cell.cell_type == "code" and ("hide_output" in d or d.get("output") == "false"):
            cell.outputs = []
        if cell.source.strip() or cell.get("outputs"):
            res.append(cell)
    return res


def text(value) -> str:
    return value if isinstance(value, str) else "".join(value)


def fence(code: str, language: str = "") -> str:
    "`code` in a Markdown fence that it doesn't end by itself."
    longest = max(map(len, re.findall(r"^`{3,}", code, re.M)), default=2)
    ticks = "`" * (longest + 1)
    return f"{ticks}{language}\n{code.strip(chr(10))}\n{ticks}"


def output_markdown(output, picture) -> str:
    "One output as Markdown: Markdown as it is, pictures through `picture(html)`, all else as text."
    if output.output_type == "stream":
        return fence(text(output.text)) if output.name == "stdout" else ""
    if output.output_type == "error":
        return fence(f"{output.ename}: {output.evalue}")
    data = output.data
    if "text/markdown" in data:
        return text(data["text/markdown"])
    html, plain = text(data.get("text/html", "")), text(data.get("text/plain", ""))
    if "<img" in html:
        return picture(html)
    if plain and not re.fullmatch(r"<[\w.]+ object.*>", plain.strip()):
        return fence(plain)
    return html_table(html) if "<table" in html and "<progress" not in html else ""


def html_table(html: str) -> str:
    "The first table in `html` as Markdown: what training prints."
    rows = []
    for row in re.findall(r"<tr\b.*?</tr>", html, re.S):
        cells = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.S)
        rows.append([" ".join(unescape(re.sub(r"<[^>]+>", "", o)).split()) for o in cells])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(o) + " |" for o in rows)


def markdown(
    path: Path,
    link,  # Markdown with the notebook's links -> Markdown with links for where it will stand
    picture,  # HTML with an `<img>` -> Markdown
) -> str:
    "The notebook at `path` as one Markdown text."
    parts = []
    for cell in shown(path):
        if cell.cell_type == "markdown":
            parts.append(link(cell.source))
        if cell.cell_type == "code":
            if cell.source.strip():
                parts.append(fence(cell.source, "python"))
            parts += [link(o) for o in (output_markdown(o, picture) for o in cell.outputs) if o]
    return "\n\n".join(o.strip("\n") for o in parts) + "\n"


def words(html: str) -> str:
    "What the pictures in `html` show, in words: where a file of Markdown can't hold the picture."
    return "\n\n".join(f"*{o}*" for o in re.findall(r'<img[^>]*\balt="([^"]*)"', html))


def readme() -> str:
    at = address()
    return markdown(ROOT / "nbs/index.ipynb", lambda o: absolute(o, "nbs", at), words)


def main():
    problem = "README.md isn't nbs/index.ipynb: run `python scripts/readme.py`"
    made_file(__doc__, ROOT / "README.md", readme, problem)


if __name__ == "__main__":
    main()
