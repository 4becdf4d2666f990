"Every notebook runs from top to bottom, as `nbdev-test` runs it, and is fit to be read as it is."

import ast
import json
import re
import statistics
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from conftest import SECONDS, copy_checkout
from links import ROOT
from notebooks import NotebookError, execute, notebooks, runnable, tidy

NBS = notebooks()
CHAPTERS = [o for o in NBS if o.parent.name == "nbs" and re.match(r"\d\d_", o.name)]
# Roots of paths that only exist on one machine; the text of a picture is no path
MACHINE = re.compile(
    r"(?<![\w.:/-])(?:/(?:work|root|home|Users|tmp|var/folders|opt|mnt)/[\w.]+|[A-Z]:\\\w+)"
)
PICTURE = re.compile(r"data:image/[\w+]+;base64,[\w+/=\s\\]+")
per_notebook = pytest.mark.parametrize(
    "path", NBS, ids=lambda o: o.relative_to(ROOT / "nbs").as_posix()
)
per_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda o: o.name)


def read(path):
    return nbformat.read(path, as_version=4)


def parsed(source: str) -> ast.Module:
    "The syntax tree of a cell; a magic is a call."
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.parse(TransformerManager().transform_cell(source))


def statements(source: str) -> int:
    """How many statements a cell holds, those in its functions and classes too. Imports and
    docstrings don't count, nor does layout: a call over six lines is one, `a = 1; b = 2` two."""
    tree = parsed(source)
    imports = (ast.Import, ast.ImportFrom)
    count = sum(isinstance(o, ast.stmt) and not isinstance(o, imports) for o in ast.walk(tree))
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    docstrings = [o for o in ast.walk(tree) if isinstance(o, documented) and ast.get_docstring(o)]
    return count - len(docstrings)


def joined(x):
    return "".join(x) if isinstance(x, list) else x


def shows(cell):
    return any(o.output_type in ("display_data", "execute_result") for o in cell.outputs)


class Pictures(HTMLParser):
    "Alt texts of a piece of HTML's pictures; None where there is none."

    def __init__(self, html):
        super().__init__()
        self.alts = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.alts.append((dict(attrs).get("alt") or "").strip() or None)


def alts(cell) -> list[str | None]:
    "The alternative text of every picture in `cell`: None for a picture without."
    if cell.cell_type == "markdown":
        prose = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
        marked = [o.strip() or None for o in re.findall(r"!\[(.*?)\]\(", prose)]
        return marked + Pictures(prose).alts
    if cell.cell_type != "code":
        return []
    found = []
    for out in cell.outputs:
        data = out.get("data", {})
        for mime in data:
            if mime.startswith("image/"):
                found.append(out.metadata.get(mime, {}).get("alt") or out.metadata.get("alt"))
        found += Pictures(joined(data.get("text/html", ""))).alts
    return found


def texts(nb):
    "Everything in a notebook that a reader could see."
    for cell in nb.cells:
        yield cell.source
        for out in cell.get("outputs", []):
            shown = {k: v for k, v in out.items() if k != "metadata"}
            yield PICTURE.sub("", json.dumps(shown, ensure_ascii=False))


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """What `nbdev-test` says of all notebooks, run once over a copy of the committed files, and
    that copy with the outputs."""
    folder = copy_checkout(tmp_path_factory.mktemp("nbdev") / "course")
    command = [Path(sys.executable).parent / "nbdev-test", "--save", "--timing"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True), folder


def verdict(run, name):
    """The seconds that the notebook `name` took, None where they aren't known; and why it failed,
    None if it didn't."""
    failed = run.stderr.partition("nbdev Tests Failed On The Following Notebooks:")[2].split()
    seconds = re.search(rf"^{re.escape(name)}: (\d+) secs$", run.stdout, re.M)
    if name in failed or run.returncode and not failed:
        return None, run.stdout + run.stderr
    return seconds and int(seconds[1]), None


@per_notebook
def test_runs(path, tested, record_property):
    run, folder = tested
    seconds, problem = verdict(run, path.name)
    assert not problem, problem
    if seconds is None:
        return  # of a notebook that passed beside others that failed nothing more is known
    record_property("seconds", seconds)
    if seconds > SECONDS:
        warnings.warn(f"{path.name} took {seconds} s: {SECONDS} at most")
    ran, new = runnable(path), read(folder / path.relative_to(ROOT))
    missing = [
        now.source
        for then, now in zip(read(path).cells, tidy(new).cells, strict=True)
        if now.cell_type == "code" and now.id in ran and shows(now) and not shows(then)
    ]
    command = f"scripts/notebooks.py run --save {path.name}"
    assert not missing, f"without the output of these cells: run {command}\n" + lines(missing)


def lines(sources):
    return "\n---\n".join(sources)


@per_notebook
def test_readable(path):
    nb = read(path)
    title = re.match(r"# \S.*\n+> \S", nb.cells[0].source)
    assert title, "the first cell is a title and a summary: '# …', then '> …'"
    # Without a kernel's name, JupyterLab asks for one before anything runs.
    assert nb.metadata.get("kernelspec", {}).get("name") == "python3", dict(nb.metadata)
    assert set(nb.metadata) == {"kernelspec"}, dict(nb.metadata)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    errors = [o.ename for o in outputs if o.output_type == "error"]
    assert not errors, f"an error among the outputs: {errors}"
    assert path.stat().st_size < 2_000_000, "over 2 MB: make the pictures smaller"


@per_notebook
def test_pictures_have_words(path):
    bare = [c.source for c in read(path).cells if None in alts(c)]
    hint = "a picture without alternative text (show it with show_figure)"
    assert not bare, f"{hint}:\n{lines(bare)}"


@per_notebook
def test_no_machine_paths(path):
    found = [o for text in texts(read(path)) for o in MACHINE.findall(text)]
    assert not found, f"paths of one machine: {found}"


@per_chapter
def test_small_steps(path):
    "Half of the code cells have at most 4 statements, a tenth over 12; prose is twice the code."
    cells = read(path).cells
    code = [statements(o.source) for o in cells if o.cell_type == "code"]
    median, long = statistics.median(code), sum(n > 12 for n in code) / len(code)
    words = sum(len(o.source.split()) for o in cells if o.cell_type == "markdown")
    assert median <= 4, f"half of the code cells have {median} statements or more: 4 at most"
    assert long <= 0.1, f"{long:.0%} of the code cells have over 12 statements: 10% at most"
    enough = words >= 2 * sum(code)
    assert enough, f"{words} words for {sum(code)} statements: two a statement at least"


def install_cell(path):
    "The cell of a notebook that installs the package; None where there is none."
    code = [o.source for o in read(path).cells if o.cell_type == "code"]
    return next((o for o in code if "%pip install" in o), None)


@pytest.mark.parametrize("path", [o for o in NBS if install_cell(o)], ids=lambda o: o.name)
@pytest.mark.parametrize("where, installs", [("colab", True), ("kaggle", True), ("here", False)])
def test_the_package_is_installed_where_it_is_missing(path, where, installs, monkeypatch):
    if where == "colab":
        monkeypatch.setitem(sys.modules, "google.colab", sys)
    if where == "kaggle":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    asked = []

    class Shell:
        def run_line_magic(self, name, line):
            asked.append((name, line))

    code = TransformerManager().transform_cell(install_cell(path))
    exec(code, {"get_ipython": Shell})
    assert asked == [("pip", "install -q sota_course")] * installs


# The checks themselves, on notebooks that break them


def said(code, out, err):
    return subprocess.CompletedProcess([], code, out, err)


def test_what_nbdev_test_says_is_understood():
    head = "ZeroDivisionError\nnbdev Tests Failed On The Following Notebooks:\n=====\n"
    failed = said(1, "", head + "\t01_a.ipynb\n\tb.ipynb\n")
    assert verdict(failed, "b.ipynb")[1] and verdict(failed, "01_a.ipynb")[1]
    assert verdict(failed, "a.ipynb") == (None, None)
    passed = said(0, "Success.\n01_a.ipynb: 12 secs\nb.ipynb: 3 secs\n", "")
    assert verdict(passed, "b.ipynb") == (3, None)
    assert "BrokenProcessPool" in verdict(said(1, "", "BrokenProcessPool"), "b.ipynb")[1]


LONG_CALL = """total = add(
    1,
    2,
    3,
    4,
)"""


@pytest.mark.parametrize(
    "source, count",
    [
        ("a = 1; b = 2", 2),
        (LONG_CALL, 1),
        ('def f():\n    "What it does."\n    return 1', 2),
        ('class A:\n    """Words."""\n\n    def f(self): return 1', 3),
        ("#| hide\n%matplotlib inline\nif x:\n    !ls\nelse:\n    y = 1", 4),
        ("import a, b\nfrom c import d", 0),
        ("# nothing", 0),
    ],
)
def test_statements_are_counted(source, count):
    assert statements(source) == count


def notebook(tmp_path, *sources):
    cells = [nbformat.v4.new_code_cell(o) for o in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "bad.ipynb")
    return tmp_path / "bad.ipynb"


@pytest.mark.parametrize(
    "source, error",
    [
        ("1/0", "ZeroDivisionError"),
        ("import os; os._exit(3)", r"kernel died.*\n.*os\._exit"),
        ("import time; time.sleep(60)", r"longer than 3 s:\nimport time"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, source, error):
    with pytest.raises(NotebookError, match=rf"bad\.ipynb: (.|\n)*{error}"):
        execute(notebook(tmp_path, "x = 1", source), timeout=3)


def test_flagged_cells_are_left_out(tmp_path):
    path = notebook(tmp_path, "#| slow\n1/0", "#| cuda\n1/0", "#| eval: false\n1/0", "1")
    assert shows(execute(path)[0].cells[3])
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        execute(path, flags=["slow"])


def test_the_kernel_has_the_checkout(tmp_path):
    nb, _ = execute(
        notebook(tmp_path, "import sota_course; print(sota_course.__file__)"), cwd=tmp_path
    )
    (out,) = nb.cells[0].outputs
    assert out.name == "stdout" and Path(out.text.strip()).parent == ROOT / "sota_course"


def shown(**data):
    "A cell with one output."
    mimes = {k.replace("_", "/"): v for k, v in data.items()}
    return nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", mimes)])


TAGS = '<img src="a.png"> <img alt="" src="b.png"> <img alt="Words" src="c.png">'
prose = nbformat.v4.new_markdown_cell


@pytest.mark.parametrize(
    "cell, found",
    [
        (prose("![](a.png) and ![A church](b.png)"), [None, "A church"]),
        (prose(TAGS), [None, None, "Words"]),
        (prose("`![](a.png)` shows a picture, and `<img>` too"), []),
        (shown(image_png="iVBO"), [None]),
        (shown(text_html="<img src='x'>"), [None]),
    ],
)
def test_bare_pictures_are_found(cell, found):
    assert alts(cell) == found


@pytest.mark.parametrize(
    "text",
    ["to /home/ann/x.csv", "PosixPath('/root/.fastai')", 'File "/work/main/a.py"', r"C:\Users"],
)
def test_machine_paths_are_found(text):
    assert MACHINE.search(text)


@pytest.mark.parametrize(
    "text", ["https://example.org/home/page", "runs/work/x", "train/n01440764/x.JPEG", "1/2"]
)
def test_other_paths_are_left_alone(text):
    assert not MACHINE.search(text)
