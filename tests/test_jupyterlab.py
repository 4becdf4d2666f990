"The notebooks in a real JupyterLab and browser: they run from the menu, and their sliders move."

import ast
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
import pytest
from playwright.sync_api import expect

from links import ROOT

pytestmark = pytest.mark.browser
SETTINGS = {
    # Every cell is in the page, also those out of sight.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}
# What a cell wrote to stderr looks the same, but for the traceback.
ERROR = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"
# A cell was run when it has its number, and a failed one stops those after it.
FINISHED = """() => {
    const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]
        .filter(o => o.querySelector('.cm-content')?.innerText.trim())
    const prompts = cells.map(o => o.querySelector('.jp-InputPrompt').innerText)
    const failed = [...document.querySelectorAll("ERROR")]
        .some(o => o.innerText.includes('Traceback'))
    const idle = !prompts.some(o => o.includes('*'))
    return prompts.length && idle && (failed || prompts.every(o => /\\d/.test(o)))
}""".replace("ERROR", ERROR)
PICTURE = ".jp-OutputArea-output img"
SLIDER = ".noUi-handle"
LABEL = ".jp-OutputArea .widget-label"


def read(path):
    return nbformat.read(path, as_version=4)


def names(cell):
    """Which names a cell gives a value, or calls a method of by itself, as in `run.train()`; and
    which it uses. What only defines or imports makes "*"."""
    tree = ast.parse(re.sub(r"^(\s*)%.*", r"\1pass", cell.source, flags=re.M))
    nodes, functions = list(ast.walk(tree)), (ast.FunctionDef, ast.ClassDef)
    plain = [o for o in nodes if isinstance(o, ast.Name)]
    used = {o.id for o in plain if isinstance(o.ctx, ast.Load)}
    made = {o.id for o in plain if isinstance(o.ctx, ast.Store)}
    made |= {o.name for o in nodes if isinstance(o, functions)}
    alone = [o.value for o in tree.body if isinstance(o, ast.Expr)]
    methods = [o.func for o in alone if isinstance(o, ast.Call)]
    owners = [o.value for o in methods if isinstance(o, ast.Attribute)]
    made |= {o.id for o in owners if isinstance(o, ast.Name)}
    if all(isinstance(o, (*functions, ast.Import, ast.ImportFrom)) for o in tree.body):
        made.add("*")
    return made, used


def cut(path):
    """The first cell of a notebook with sliders, and of those before it the ones that it needs. An
    epoch of training is enough to move them."""
    nb = read(path)
    code = [o for o in nb.cells if o.cell_type == "code"]
    at = next((i for i, o in enumerate(code) if o.source.startswith("explore(")), -1)
    nb.cells, needed = [], set()
    for o in reversed(code[: at + 1]):
        made, used = names(o)
        if nb.cells and not made & (needed | {"*"}):
            continue
        o.source, needed = o.source.replace("epochs=3", "epochs=1"), needed | used
        nb.cells.insert(0, o)
    return nb


WHOLE = ["index.ipynb", "00_data.ipynb"]
PARTS = {o.name: cut(o) for o in sorted((ROOT / "nbs").glob("0*.ipynb")) if o.name not in WHOLE}
CHAPTERS = {name: nb for name, nb in PARTS.items() if nb.cells}


@contextmanager
def serving(home, folder, command):
    """JupyterLab's address and token while `command`, run in `folder`, serves it; what it keeps
    goes to `home`."""
    kept = {f"JUPYTER_{o}_DIR": str(home / o.lower()) for o in ("CONFIG", "DATA", "RUNTIME")}
    kept |= {f"JUPYTERLAB_{o}_DIR": str(home / o.lower()) for o in ("SETTINGS", "WORKSPACES")}
    env = os.environ | kept | {"PYTHONPATH": str(ROOT)}
    for name, value in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    token = secrets.token_hex(16)
    options = """--no-browser --allow-root --ip=127.0.0.1 --port=0 --LabApp.news_url=
        --LabApp.extension_manager=readonly --ServerApp.open_browser=False""".split()
    command = [*command, *options, f"--IdentityProvider.token={token}"]
    with open(home / "log", "wb") as log:
        unseen = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        server = subprocess.Popen(command, cwd=folder, env=env, **unseen)
    try:
        yield wait_for(server, home), token
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab's address and token, and the folder with copies of the notebooks, without outputs,
    that it serves."""
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    whole = {o: read(ROOT / "nbs" / o) for o in (*WHOLE, "course/figures.ipynb")}
    for name, nb in (whole | {f"cut_{o}": nb for o, nb in CHAPTERS.items()}).items():
        for o in nb.cells:
            if o.cell_type == "code":
                o.outputs = []
        nbformat.write(nb, folder / name.split("/")[-1])
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}"]
    with serving(home, folder, command) as (url, token):
        yield url, token, folder


def wait_for(server, home, seconds=90) -> str:
    "The server's address, once it answers: its runtime folder says which free port it took."
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        for info in (home / "runtime").glob("jpserver-*.json"):
            try:
                url = json.loads(info.read_text())["url"]
                with urllib.request.urlopen(f"{url}api", timeout=5):
                    return url
            except (OSError, ValueError):
                pass  # half written, or not yet listening
        time.sleep(0.2)
    pytest.fail("JupyterLab did not start:\n" + (home / "log").read_text()[-3000:])


@pytest.fixture(scope="module")
def context(browser):
    "One for all tests, so that JupyterLab's scripts are fetched and compiled once."
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    yield context
    context.close()


@pytest.fixture
def run(context, lab, tmp_path):
    "Open a notebook and choose Run > Run All Cells: the page, when all have run."
    url, token, folder = lab
    page = context.new_page()

    def open_and_run(name, seconds=240):
        page.goto(f"{url}lab/tree/{name}?token={token}&reset", timeout=120_000)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=120_000)
        page.locator("#jp-main-statusbar", has_text="| Idle").wait_for(timeout=120_000)
        menu = {".lm-MenuBar-itemLabel": "Run", ".lm-Menu-itemLabel": "Run All Cells"}
        for label, text in menu.items():
            page.locator(label, has_text=re.compile(f"^{text}$")).click()
        page.wait_for_function(FINISHED, timeout=seconds * 1000)
        return page

    yield open_and_run
    page.screenshot(path=tmp_path / "lab.png")
    page.close()


def errors(page):
    return [o for o in page.locator(ERROR).all_inner_texts() if "Traceback" in o]


def bare(page):
    bad = "o => !o.alt.trim() || !o.naturalWidth"
    start = "o => o.outerHTML.slice(0, 200)"
    return page.eval_on_selector_all(PICTURE, f"imgs => imgs.filter({bad}).map({start})")


def clipped(page):
    cut_off = "o => o.scrollWidth > o.clientWidth"
    script = f"labels => labels.filter({cut_off}).map(o => o.textContent)"
    return page.eval_on_selector_all(LABEL, script)


def move(page):
    """Move each slider of `page`; the picture below must change, and what is said of it. Returns
    how many there are."""
    moved = 0
    assert clipped(page) == [], "labels that are cut off"
    for cell in page.locator(".jp-CodeCell", has=page.locator(SLIDER)).all():
        picture, labels = cell.locator(PICTURE).last, cell.locator(LABEL).all_inner_texts()
        # Found as a screen reader finds it: by its role and its name, the label that people see.
        sliders = [cell.get_by_role("slider", name=o, exact=True) for o in labels]
        assert len(sliders) == cell.locator(SLIDER).count() and "_" not in "".join(labels)
        for slider in sliders:
            before, alt = picture.get_attribute("src"), picture.get_attribute("alt")
            slider.press("ArrowRight")
            expect(picture).not_to_have_attribute("src", before, timeout=60_000)
            expect(picture).not_to_have_attribute("alt", alt)
            moved += 1
    return moved


@pytest.mark.parametrize("name", WHOLE)
def test_runs_from_the_menu(run, name):
    page = run(name)
    assert errors(page) == []
    assert page.locator(PICTURE).count() > 0, "shows no picture"
    sources = [o.source for o in read(ROOT / "nbs" / name).cells]
    assert bool(move(page)) == any(o.startswith("explore(") for o in sources)
    assert bare(page) == [], "pictures that don't load, or have no alternative text"


def test_an_error_is_seen(run, lab):
    "Or the test above would pass whatever happens."
    cells = [nbformat.v4.new_code_cell(o) for o in ("x = 1", "1/0", "x")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "python3"}}
    bad = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(bad, lab[2] / "bad.ipynb")
    assert "ZeroDivisionError" in errors(run("bad.ipynb"))[0]


def test_a_slider_moves_its_picture(run):
    page = run("figures.ipynb")
    wave = page.locator(f"{PICTURE}[alt^='A sine wave of frequency']")
    before = wave.get_attribute("alt"), wave.get_attribute("src")
    assert before[0] == "A sine wave of frequency 5."
    page.locator(SLIDER).first.press("ArrowRight")
    page.locator(f"{PICTURE}[alt='A sine wave of frequency 6.']").wait_for(timeout=30_000)
    assert wave.get_attribute("src") != before[1]


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_slider_of_a_chapter_moves_its_picture(run, name):
    page = run(f"cut_{name}")
    assert errors(page) == [] and move(page) and bare(page) == []


LINKED = [
    "CONTRIBUTING.md",
    "LICENSE",
    "CITATION.cff",
    "results/README.md",
    "nbs/index.ipynb",
    "nbs/00_data.ipynb",
]


@pytest.fixture(scope="module")
def make_lab(tmp_path_factory):
    """What `make lab` starts, in a copy of what the front page links to: its address and token, and
    its home."""
    folder, home = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("jupyter")
    for o in (*LINKED, "Makefile", "pyproject.toml"):
        (folder / o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / o, folder / o)
    command = ["make", "--no-print-directory", "-n", "lab"]
    dry = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    python, *words = shlex.split(dry.stdout.splitlines()[-1])
    assert python == ".venv/bin/python"
    with serving(home, folder, [sys.executable, *words]) as (url, token):
        yield url, token, home


def test_make_lab_opens_the_front_page(make_lab):
    url, token, home = make_lab
    # The page that a browser is started with, where there is one.
    pages = [o.read_text() for o in (home / "runtime").glob("jpserver-file-to-run-*-open.html")]
    assert len(pages) == 1 and "/lab/tree/nbs/index.ipynb" in pages[0]


@pytest.fixture
def front(make_lab, context):
    page = context.new_page()
    page.goto(f"{make_lab[0]}lab/tree/nbs/index.ipynb?token={make_lab[1]}&reset", timeout=120_000)
    page.locator(".jp-Notebook a[href*='/files/']").first.wait_for(timeout=60_000)
    yield page
    page.close()


@pytest.mark.parametrize(
    "link,title",
    [
        ("CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("LICENSE", "LICENSE"),
        ("CITATION.cff", "CITATION.cff"),
        ("results", "README.md"),
        ("Data", "00_data.ipynb"),
    ],
)
def test_links_of_the_front_page_open_files(front, link, title):
    front.locator(".jp-Notebook a", has_text=re.compile(f"^{link}$")).first.click()
    tab = front.locator(".lm-DockPanel-tabBar .lm-TabBar-tabLabel", has_text=title).first
    expect(tab).to_be_visible(timeout=60_000)
    expect(front.locator(".jp-Dialog")).to_have_count(0)
