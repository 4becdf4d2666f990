"""Build the site from the executed notebooks, without Quarto and without running a cell.

    python docs/build.py [--out _docs]

Each notebook becomes a page with its committed outputs, each module a reference page from its docments. Sphinx turns
them into HTML, and a warning is an error. Beside each page stands its Markdown twin (`<page>.html.md`, where the
modules' docstrings point), and `llms.txt` lists them. The site is built aside and then put in place: an interrupted
or failed build leaves the former one.
"""
import argparse
import ast
import base64
import inspect
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from functools import reduce
from hashlib import sha1
from html import escape
from importlib import import_module
from pathlib import Path

import nbformat
from fastcore.docments import docments
from fastcore.nbio import NbCell, mk_cell
from nbdev.doclinks import patch_name
from sphinx.cmd.build import build_main

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent/"scripts"), str(DOCS.parent)]
from links import BADGES, BRANCH, LINK, ROOT, absolute, address, outside_code, page_name, resolve
from readme import markdown, shown, text

PACKAGE = "sota_course"


# --- the reference: what a module exports, with its docments ---

@dataclass
class Symbol:
    "A function, class or method of the package."
    module: str      # sota_course.plots
    name: str        # figure_html, or Class.method
    node: ast.AST
    kind: str        # function, class, method or property
    obj: object = field(repr=False, default=None)

    @property
    def full(self) -> str: return f"{self.module}.{self.name}"

    @property
    def url(self) -> str: return f"{api_page(self.module)}.html#{self.full}"


def api_page(module: str) -> str: return "api/" + module.split(".", 1)[1]


def modules() -> list[Path]:
    return sorted(o for o in (ROOT/PACKAGE).rglob("*.py") if not o.name.startswith("_"))


def module_name(path: Path) -> str: return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def defines(node) -> list[str]:
    "The names that a definition gives: several for a patch of several classes."
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): return []
    names = patch_name(node) if isinstance(node, ast.FunctionDef) else node.name
    return names if isinstance(names, list) else [names]


def kind_of(node, in_class: bool) -> str:
    if isinstance(node, ast.ClassDef): return "class"
    marks = " ".join(ast.unparse(o) for o in node.decorator_list)
    if "property" in marks or "as_prop=True" in marks: return "property"
    return "method" if in_class else "function"


def symbols(path: Path) -> list[Symbol]:
    "What the module at `path` exports, in its order: functions, classes with their methods, patches of other classes."
    name, res = module_name(path), []
    module = import_module(name)
    public = set(module.__all__)
    def add(full, node, in_class):
        try: obj = reduce(getattr, full.split("."), module)
        except AttributeError: return  # a method that a decorator took away
        res.append(Symbol(name, full, node, kind_of(node, in_class), obj.fget if isinstance(obj, property) else obj))
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for full in defines(node):
            if "." in full or full in public:
                if not full.rpartition(".")[2].startswith("_"): add(full, node, "." in full)
        if isinstance(node, ast.ClassDef) and node.name in public:
            for o in node.body:
                if isinstance(o, ast.FunctionDef) and not o.name.startswith("_"): add(f"{node.name}.{o.name}", o, True)
    return res


def written(node) -> dict[str, tuple[str, str]]:
    "The types and defaults of a definition's parameters as its source has them: `Path.home()`, not one machine's folder."
    if isinstance(node, ast.ClassDef):
        node = next((o for o in node.body if isinstance(o, ast.FunctionDef) and o.name == "__init__"), None)
        if not node: return {}
    def src(o): return ast.unparse(o) if o else ""
    def kind(o): return o.value if isinstance(o, ast.Constant) and isinstance(o.value, str) else src(o)
    a = node.args
    pairs = [*zip([*a.posonlyargs, *a.args][::-1], a.defaults[::-1]), *zip(a.kwonlyargs, a.kw_defaults)]
    defaults = {arg.arg: src(o) for arg, o in pairs}
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return {o.arg: (kind(o.annotation), defaults.get(o.arg, "")) for o in every} | {"return": (kind(node.returns), "")}


def plain(o) -> str:
    "A type or default that no source line gives, as a word."
    if o is inspect.Parameter.empty: return ""
    return getattr(o, "__name__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(o))


def parameters(s: Symbol) -> list[tuple[str, str, str, str]]:
    "A row for each parameter of `s`, and for what it returns: name with stars, type, default, docment."
    said, res = written(s.node), []
    for name, o in docments(s.obj, full=True, args_kwargs=True).items():
        if name in ("self", "cls"): continue
        kind, default = said.get(name) or (plain(o.anno), plain(o.default))
        if name == "return" and not o.docment and kind in ("", "None"): continue
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(o.get("kind"), "")
        res.append((stars + name, kind, default, o.docment or ""))
    return res


def signature(s: Symbol) -> str:
    if s.kind == "property": return s.name
    def show(name, default): return f"{name}={default}" if default else name
    return f"{s.name}({', '.join(show(n, d) for n, _, d, _ in parameters(s) if n != 'return')})"


def table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    "A Markdown table, without the columns in which nothing stands."
    keep = [i for i in range(len(head)) if any(o[i] for o in rows)]
    def line(cells): return "| " + " | ".join(cells[i].replace("|", "\\|").replace("\n", " ") for i in keep) + " |"
    return "\n".join([line(head), "|" + "---|"*len(keep), *map(line, rows)])


def described(s: Symbol) -> str:
    "The docstring of `s` and its parameters, in Markdown."
    def code(o): return f"`{o}`" if o else ""
    rows = [("returns" if n == "return" else code(n), code(k), code(d), doc) for n, k, d, doc in parameters(s)]
    doc = inspect.cleandoc(ast.get_docstring(s.node) or "")
    return "\n\n".join(filter(None, [doc, table(rows, ("Parameter", "Type", "Default", "Meaning")) if rows else ""]))


def module_doc(path: Path) -> str:
    "The module's docstring, without nbdev's line that points to the site."
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.sub(r"\n*^Docs: .*$", "", doc, flags=re.M)


# --- pages ---

@dataclass
class Page:
    "A page of the site."
    name: str        # tools/plots: its address without .html
    title: str
    summary: str
    group: str       # where the navigation lists it
    twin: str        # the page in plain Markdown


class Site:
    "Writes what Sphinx reads into the folder `src`, and what is copied as it is into `extra`."
    def __init__(self, src: Path, extra: Path):
        self.src, self.extra, self.at, self.pages = src, extra, address(), []
        self.paths = {o.relative_to(ROOT/"nbs").as_posix(): o for o in sorted((ROOT/"nbs").rglob("*.ipynb"))
                      if ".ipynb_checkpoints" not in o.parts}
        self.symbols = {module_name(o): symbols(o) for o in modules()}
        self.known = {}
        for s in (s for o in self.symbols.values() for s in o): self.known.setdefault(s.name, s)

    def write(self, name: str, content: str):
        path = self.src/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")

    def linked(self, md: str) -> str:
        "`md` with names of the package, where they stand between backticks, made links to the reference."
        def link(m):
            s = self.known.get(m[1])
            return f"{{py:obj}}`{m[1]}{m[2] or ''} <{s.full}>`" if s else m[0]
        names = re.compile(r"(?<![`\[])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])")
        parts = re.split(r"(^```.*?^```[^\n]*$|^#.*$|\[[^\]\n]*\]\([^)\n]*\))", md, flags=re.M | re.S)
        return "".join(o if i % 2 else names.sub(link, o) for i, o in enumerate(parts))

    def local(self, md: str, nb: str) -> str:
        "`md` from the notebook `nb` with its links to files: another notebook's page, or the file on GitHub."
        folder, depth = f"nbs/{nb}".rpartition("/")[0], nb.count("/")
        def change(m):
            path, mark, anchor = m[1].partition("#")
            found = resolve(m[1], folder) and resolve(path, folder)
            if not found: return m[1]
            if (other := found.removeprefix("nbs/")) in self.paths:
                return "../"*depth + page_name(other) + ".ipynb" + mark + anchor.lower()
            return self.at.blob(found) + mark + anchor
        return outside_code(lambda o: LINK.sub(change, o), md)

    def full(self, md: str, nb: str) -> str:
        "`md` from the notebook `nb` with full links, for its twin."
        def page(m):
            other = m[1].partition("#")[0].removeprefix(self.at.blob("nbs/"))
            return self.at.page(other) + ".md" if other in self.paths else m[1]
        return LINK.sub(page, absolute(md, f"nbs/{nb}".rpartition("/")[0], self.at))

    def picture(self, data: str, kind: str) -> tuple[str, str]:
        "Store a picture: its address on the site, and its size as attributes."
        raw = base64.b64decode(data)
        name = f"pictures/{sha1(raw).hexdigest()[:16]}.{kind}"
        (self.extra/"pictures").mkdir(parents=True, exist_ok=True)
        (self.extra/name).write_bytes(raw)
        wide, high = (int.from_bytes(raw[i:i+4], "big") for i in (16, 20))
        return name, f' width="{wide}" height="{high}"' if kind == "png" else ""

    def pictures(self, html: str, nb: str, cell: NbCell) -> str:
        "`html` with its embedded pictures as files. Raises `ValueError` for a picture without words."
        for tag in re.findall(r"<img\b[^>]*>", html):
            if not re.search(r"""\balt=(["'])\s*(?!\1)\S""", tag): raise ValueError(f"nbs/{nb}, cell {cell.id}: a picture without alt text")
        def stored(m):
            name, size = self.picture(m[2], m[1])
            return f'src="{"../"*nb.count("/")}{name}"{size} loading="lazy"'
        return re.sub(r'src="data:image/(\w+);base64,([^"]+)"', stored, html)

    def notebook(self, nb: str, group: str):
        "Write the page of the notebook `nb`, a path below `nbs`."
        name, path, cells = page_name(nb), self.paths[nb], []
        title, summary = heading(path)
        for cell in shown(path):
            if cell.cell_type == "code": cells += self.code(cell, nb)
            elif cell.cell_type == "markdown": cells.append(self.prose(cell, nb))
        if nb == "index.ipynb": cells.append(mk_cell(self.navigation(), "markdown"))
        out = nbformat.v4.new_notebook(metadata=dict(
            kernelspec=dict(name="python3", display_name="python3"), language_info=dict(name="python"),
            myst=dict(html_meta=dict(description=plain_words(summary)))))
        out.cells = [nbformat.from_dict({k: o[k] for k in ("cell_type", "metadata", "source", "id")} |
                                        (dict(outputs=o.outputs, execution_count=None) if o.cell_type == "code" else {}))
                     for o in cells]
        self.write(f"{name}.ipynb", nbformat.writes(out))
        def named(html):
            return "\n\n".join(f"![{alt}]({self.at.docs}{self.picture(data, kind)[0]})" for alt, kind, data in
                               re.findall(r'<img[^>]*\balt="([^"]*)"[^>]*src="data:image/(\w+);base64,([^"]+)"', html))
        twin = markdown(path, lambda o: self.full(o, nb), named)
        self.pages.append(Page(name, title, summary, group, twin))

    def prose(self, cell: NbCell, nb: str) -> NbCell:
        if BADGES.fullmatch(cell.source.strip()):
            # Buttons of our own: a page fetches nothing from elsewhere.
            links = re.findall(r"\[!\[(Open in \w+)\]\([^)]*\)\]\(([^)]*)\)", cell.source)
            html = "".join(f'<a href="{escape(url)}">{label}</a>' for label, url in links)
            return mk_cell(f'<div class="open-in">{html}</div>', "markdown")
        cell.source = self.linked(self.local(cell.source, nb))
        return cell

    def code(self, cell: NbCell, nb: str) -> list[NbCell]:
        "The cells that show a code cell: what it exports is marked, its outputs are fit for a page."
        tags = [] if cell.source.strip() else ["remove-input"]
        cell.source = cell.source or "#"  # myst-nb drops a cell without code, and its outputs with it
        if {"code-fold", "hide_input"} & set(cell.directives_): tags.append("hide-input")
        cell.metadata = dict(tags=tags)
        cell.outputs = [o for o in cell.outputs if "<progress" not in text(o.get("data", {}).get("text/html", ""))]
        for o in cell.outputs:
            data = o.get("data", {})
            if any(k.startswith("image/") for k in data) and "text/html" not in data:
                raise ValueError(f"nbs/{nb}, cell {cell.id}: a picture without alt text: show it with show_figure")
            if "text/html" in data: data["text/html"] = self.pictures(text(data["text/html"]), nb, cell)
            if "text/markdown" in data: data["text/markdown"] = self.linked(self.local(text(data["text/markdown"]), nb))
            if o.output_type in ("execute_result", "display_data"): o["metadata"] = {}
        return [*self.mark(cell, nb), cell]

    def mark(self, cell: NbCell, nb: str) -> list[NbCell]:
        "Above a cell that exports functions or classes: their names, as links to the reference."
        if not {"export", "exports"} & set(cell.directives_): return []
        names = [o for node in ast.parse(cell.source).body for o in defines(node)]
        if not (found := [self.known[o] for o in names if o in self.known]): return []
        up = "../"*nb.count("/")
        links = "".join(f'<a id="{s.name.lower()}" href="{up}{s.url}" title="{s.full} in the reference">{s.name}</a>' for s in found)
        # nbdev links to methods too.
        methods = [o for s in found if s.kind == "class" for n, o in self.known.items() if n.startswith(f"{s.name}.") and o.node in s.node.body]
        anchors = "".join(f'<span id="{s.name.lower()}"></span>' for s in methods)
        return [mk_cell(f'<div class="exported">{links}{anchors}</div>', "markdown")]

    def reference(self, path: Path):
        "Write the reference page of the module at `path`."
        module, doc = module_name(path), module_doc(path)
        lines = path.read_text(encoding="utf-8").splitlines()
        nb = next((m[1] for o in lines if (m := re.match(r"# AUTOGENERATED! DO NOT EDIT! File to edit: .*?nbs/(\S+\.ipynb)", o))), None)
        name, (summary, _, rest) = api_page(module), doc.partition("\n\n")
        up = "../"*name.count("/")
        chapter = f"Explained in [{heading(self.paths[nb])[0]}]({up}{page_name(nb)}.ipynb)." if nb in self.paths else ""
        source = path.relative_to(ROOT).as_posix()
        parts = [f"# {module}", f"> {summary}", self.linked(rest), chapter, f":::{{py:module}} {module}\n:::"]
        twin = [f"# {module}", doc]
        for s in self.symbols[module]:
            link = f'<a class="source" href="{self.at.blob(source)}#L{s.node.lineno}">source</a>'
            parts.append(f":::{{py:{s.kind}}} {signature(s)}\n{link}\n\n{self.linked(described(s))}\n:::")
            twin.append(f"## {signature(s)}\n\n{described(s)}")
        meta = json.dumps(dict(html_meta=dict(description=plain_words(summary))))
        self.write(f"{name}.md", f"---\nmyst: {meta}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")
        self.pages.append(Page(name, module, summary, "Reference", "\n\n".join(twin) + "\n"))

    def navigation(self) -> str:
        "The site's table of contents, which the front page carries unseen."
        groups = {}
        for o in self.pages: groups.setdefault(o.group, []).append(o.name)
        return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {group}", "", *names, "```"])
                           for group, names in groups.items())

    def make(self):
        "Write all pages. The front page comes last: it lists the others."
        for nb in self.paths:
            if "/" not in nb and nb != "index.ipynb": self.notebook(nb, "Chapters")
        for nb in self.paths:
            if "/" in nb: self.notebook(nb, "Tools")
        for path in modules(): self.reference(path)
        self.notebook("index.ipynb", "")

    def llms(self) -> str:
        "The list of pages that https://llmstxt.org describes."
        *others, front = self.pages
        parts = [f"# {front.title}", f"> {front.summary}", f"- [Front page]({self.at.docs}{front.name}.html.md)"]
        for group in dict.fromkeys(o.group for o in others):
            parts.append(f"## {group}\n\n" + "\n".join(f"- [{o.title}]({self.at.docs}{o.name}.html.md): {plain_words(o.summary)}"
                                                       for o in others if o.group == group))
        return "\n\n".join(parts) + "\n"


def heading(path: Path) -> tuple[str, str]:
    "Title and summary of a notebook: its first cell is `# title` and `> summary`. Raises `ValueError` otherwise."
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    m = re.match(r"# (.+)\n+> (.+)", first)
    if not m: raise ValueError(f"{path.relative_to(ROOT).as_posix()}: the first cell has to be `# title` and `> summary`")
    return m[1].strip(), m[2].strip()


def plain_words(md: str) -> str: return " ".join(re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", md).split())


def put(new: Path, place: Path):
    "Move the finished folder `new` to `place`, and what was there away."
    old = Path(tempfile.mkdtemp(prefix=".old-", dir=place.parent))
    if place.exists(): place.rename(old/"site")
    new.rename(place)
    shutil.rmtree(old)


def build(out: Path):
    "Build the site into `out`. Raises `ValueError` for a notebook that no page can be made of, exits on a warning."
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, and not among the system's temporary files: the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".site-", dir=out.parent) as tmp:
        tmp = Path(tmp)
        src, extra, html = (tmp/o for o in ("src", "extra", "html"))
        (tmp/".gitignore").write_text("*")  # a killed build leaves nothing that git would add
        for o in (src, extra): o.mkdir()
        site = Site(src, extra)
        site.make()
        for o in site.pages:
            twin = extra/f"{o.name}.html.md"
            twin.parent.mkdir(parents=True, exist_ok=True)
            twin.write_text(o.twin, encoding="utf-8")
        (extra/"llms.txt").write_text(site.llms(), encoding="utf-8")
        missing = (DOCS/"404.html").read_text(encoding="utf-8").replace("{home}", site.at.docs)
        (extra/"404.html").write_text(missing, encoding="utf-8")
        failed = build_main(["-q", "-W", "--keep-going", "-b", "html", "-c", str(DOCS), "-d", str(tmp/"trees"),
                             "-D", f"html_extra_path={extra}", str(src), str(html)])
        if failed: sys.exit("the site was not built: see the warnings above")
        (html/".buildinfo").unlink(missing_ok=True)  # Sphinx's own, for a second build in place
        (html/".nojekyll").touch()
        put(html, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT/"_docs", help="folder of the site")
    args = parser.parse_args()
    build(args.out)
    print(f"the site is in {args.out}: open {args.out/'index.html'}")


if __name__ == "__main__": main()
