"The site, built once: what it holds, and how it behaves in a browser, below a sub-path."

import functools
import json
import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from links import BADGES, ROOT, address, page_name, source
from notebooks import notebooks

NOTEBOOKS = [o.relative_to(ROOT / "nbs").as_posix() for o in notebooks()]
MODULES = sorted(
    ".".join(o.relative_to(ROOT / "sota_course").with_suffix("").parts)
    for o in (ROOT / "sota_course").rglob("[!_]*.py")
)


def build(out):
    command = [sys.executable, ROOT / "scripts/build_docs.py", "--out", out]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def cells(nb):
    return json.loads((ROOT / "nbs" / nb).read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("www") / "below" / "site"
    ran = build(out)
    assert ran.returncode == 0, ran.stderr
    assert not re.search("warning|error", ran.stderr, re.I), ran.stderr
    return out


def pages(site):
    return sorted(
        o.relative_to(site).as_posix() for o in site.rglob("*.html") if "_static" not in o.parts
    )


# --- without a browser ---


def test_every_notebook_and_module_has_its_page_and_twin(site):
    for name in [*map(page_name, NOTEBOOKS), *(f"api/{o}" for o in MODULES)]:
        assert (site / f"{name}.html").is_file() and (site / f"{name}.html.md").is_file(), name


def test_llms_txt_lists_every_page(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(([^)]*)\)", text)
    pages = [*map(page_name, NOTEBOOKS), *(f"api/{o}" for o in MODULES)]
    assert sorted(listed) == sorted(f"{address().docs}{o}.html.md" for o in pages)
    for nb in NOTEBOOKS:
        assert source(cells(nb)[0]).splitlines()[0].removeprefix("# ") in text


def test_the_navigation_has_a_group_for_each_room(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    groups = {o.partition("\n")[0]: o for o in text.split("\n## ")[1:]}
    assert list(groups) == ["Chapters", "Images", "Training", "Course", "Library", "Reference"]
    places = dict(Images="images/", Training="training/", Course="course/", Reference="api/")
    for group, place in places.items():
        lines = [o for o in groups[group].splitlines() if o.startswith("- ")]
        assert all(f"({address().docs}{place}" in o for o in lines), group
    assert groups["Chapters"].count("\n- ") == len([o for o in NOTEBOOKS if o[0].isdigit()])


def test_docstrings_point_to_pages_that_exist(site):
    for module in MODULES:
        path = ROOT / f"sota_course/{module.replace('.', '/')}.py"
        url = re.search(r"^Docs: (\S+?)\"*$", path.read_text(encoding="utf-8"), re.M)[1]
        assert (site / url.removeprefix(address().docs)).is_file(), url


def test_names_that_nbdev_links_to_are_on_their_pages(site):
    from sota_course._modidx import d

    for names in d["syms"].values():
        for name, (target, _) in names.items():
            page, anchor = target.split("#")
            if any(o.startswith("_") for o in name.split(".")):
                continue
            there = f'id="{anchor}"' in (site / page).read_text(encoding="utf-8")
            assert there, f"{name}: no {anchor} on {page}"


def test_nothing_of_this_machine_is_on_the_site(site):
    for path in site.rglob("*"):
        if not path.is_file() or "_static" in path.parts:
            continue
        data = path.read_bytes()
        for word in (ROOT, Path.home(), site.parent, sys.prefix):
            if len(str(word)) > 5:
                assert str(word).encode() not in data, f"{word} in {path.name}"


def test_hidden_cells_and_directives_are_not_on_the_pages(site):
    for nb in NOTEBOOKS:
        text = (site / f"{page_name(nb)}.html.md").read_text(encoding="utf-8")
        assert not re.search(r"^#\|", text, re.M), nb
        hidden = re.compile(r"#\| *(hide|include: *false)\s*\n")
        for code in filter(hidden.match, map(source, cells(nb))):
            assert code.partition("\n")[2].strip() not in text, nb


def test_a_failed_build_leaves_the_former_site(tmp_path, monkeypatch):
    import build_docs as builder

    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("former")
    monkeypatch.setattr(builder, "build_main", lambda args: 1)
    with pytest.raises(SystemExit, match="not built"):
        builder.build(tmp_path / "site")
    assert (tmp_path / "site/index.html").read_text() == "former"
    assert [o.name for o in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize(
    "data",
    [
        {"text/html": '<img src="data:image/png;base64,AA==">'},
        {"text/html": '<img alt=" " src="x.png">'},
        {"image/png": "AA==", "text/plain": "<Figure>"},
    ],
)
def test_a_picture_without_alt_text_fails_the_build(tmp_path, data):
    import build_docs as builder
    from fastcore.nbio import dict2nb

    cell = dict(
        cell_type="code",
        id="c0ffee",
        metadata={},
        source="plot()",
        execution_count=None,
        outputs=[dict(output_type="display_data", metadata={}, data=data)],
    )
    cell = dict2nb(dict(cells=[cell], metadata={})).cells[0]
    cell.directives_ = {}
    with pytest.raises(ValueError, match="x.ipynb, cell c0ffee: a picture without alt text"):
        builder.Site(tmp_path, tmp_path).code(cell, "x.ipynb")


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A site of one page with the given Markdown, without the notebooks."
    import build_docs as builder

    def make(md):
        def one(self):
            self.write("index.md", md)
            self.pages.append(builder.Page("index", "Title", "A summary.", "", md))

        monkeypatch.setattr(builder.Site, "make", one)
        builder.build(tmp_path / "site")
        return (tmp_path / "site/index.html").read_text(encoding="utf-8")

    return make


def test_formulas_need_no_script(small):
    html = small("# Title\n\nThe blend $\\tilde{x} = \\lambda x_i$, and\n\n$$\\sum_k q_k$$\n")
    assert html.count("<math") == 2 and not re.search(r"<script[^>]*mathjax", html, re.I)


def test_a_formula_that_cannot_be_shown_fails_the_build(small, tmp_path, capfd):
    with pytest.raises(SystemExit):
        small("# Title\n\n$\\nosuchcommand{x}$\n")
    assert "index: can't show the formula" in capfd.readouterr().err
    assert not (tmp_path / "site").exists()


def test_a_link_to_no_page_fails_the_build(small, tmp_path, capfd):
    with pytest.raises(SystemExit):
        small("# Title\n\n[there](nowhere.ipynb)\n")
    assert "nowhere.ipynb" in capfd.readouterr().err
    assert not (tmp_path / "site").exists()


# --- in a browser ---


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def served(site):
    "The site's address on loopback, below a sub-path as on GitHub Pages."
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{site.name}/"
    server.shutdown()


def new_page(browser, **kwargs):
    "A page of a browser, or of one of its contexts. It has patience: a busy machine is no failure."
    page = browser.new_page(**kwargs)
    page.set_default_timeout(180_000)
    return page


def watch(page, base):
    """What goes wrong on `page` from now on: messages of errors, requests to other places, answers
    that say no."""
    wrong = []

    def on_console(message):
        if message.type in ("error", "warning"):
            wrong.append(f"{message.type}: {message.text}")

    def on_request(request):
        if not request.url.startswith((base, "data:", "blob:")):
            wrong.append(f"request to {request.url}")

    def on_response(response):
        if response.status >= 400:
            wrong.append(f"{response.status} {response.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", on_request)
    page.on("response", on_response)
    return wrong


LOOK = """() => {
    const images = [...document.images]
    const start = o => o.src.slice(0, 80)
    images.forEach(o => o.loading = 'eager')
    return Promise.all(images.map(o => o.decode().catch(() => 0))).then(() => ({
        title: document.title,
        ids: [...document.querySelectorAll('[id]')].map(o => o.id),
        links: [...document.querySelectorAll('a[href]')].map(o => o.href),
        speechless: [...document.querySelectorAll('article img')]
            .filter(o => !(o.alt || '').trim()).map(start),
        unseen: images.filter(o => !o.naturalWidth).map(start),
        wide: images.filter(o => o.clientWidth > o.parentElement.clientWidth + 1).map(start),
        overflow: document.scrollingElement.scrollWidth - window.innerWidth,
    }))}"""


@pytest.fixture(scope="session")
def visits(site, served, browser):
    "What the browser found on each page, on a phone's width."
    # One for all: scripts and styles are fetched once.
    res, context = {}, browser.new_context(viewport=dict(width=390, height=800))
    for name in pages(site):
        page = new_page(context)
        wrong = watch(page, served)
        page.goto(served + name, wait_until="load")
        res[name] = page.evaluate(LOOK) | dict(wrong=wrong)
        page.close()
    context.close()
    return res


def found(visits, what):
    return {name: o[what] for name, o in visits.items() if o[what]}


@pytest.mark.browser
def test_pages_load_without_errors_and_from_nowhere_else(visits):
    assert not found(visits, "wrong")


@pytest.mark.browser
def test_every_link_within_the_site_leads_somewhere(visits, served, site):
    broken = []
    for name, o in visits.items():
        if name == "404.html":
            continue  # served at any address, it links to the site's own
        for link in o["links"]:
            url, anchor = urldefrag(link)
            if not url.startswith(served):
                continue
            target = unquote(url.removeprefix(served)) or "index.html"
            target = target.partition("?")[0]
            known = visits.get(target)
            lost = anchor and known and unquote(anchor) not in known["ids"]
            if lost or not (site / target).is_file():
                broken.append((name, link))
    assert not broken


@pytest.mark.browser
def test_pictures_have_words_and_are_shown_at_a_sane_width(visits):
    for what in ("speechless", "unseen", "wide"):
        assert not found(visits, what)


@pytest.mark.browser
def test_pages_fit_a_phone(visits):
    assert not {name: o["overflow"] for name, o in visits.items() if o["overflow"] > 0}


@pytest.mark.browser
def test_pages_have_titles_of_their_own(visits):
    titles = [o["title"] for o in visits.values()]
    assert all(titles) and len(set(titles)) == len(titles)


@pytest.fixture
def page(browser, served):
    page = new_page(browser, color_scheme="light")
    yield page
    page.close()


@pytest.mark.browser
def test_search_finds_a_function(page, served):
    name, module = "get_data", "data"
    wrong = watch(page, served)
    page.goto(served)
    page.keyboard.press("Control+k")
    page.locator("input[type=search]:visible").last.fill(name)
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html*")
    target = f"api/{module}.html#sota_course.{module}.{name}"
    hit = page.locator(f"#search-results li a[href*='{target}']").first
    hit.wait_for()
    hit.click()
    page.wait_for_url(f"**/api/{module}.html*")
    assert page.locator(f"[id='sota_course.{module}.{name}']").is_visible()
    assert not wrong


@pytest.mark.browser
def test_dark_mode_can_be_switched_on_and_stays(page, served):
    def look():
        theme = "document.documentElement.dataset.theme"
        colour = "getComputedStyle(document.body).backgroundColor"
        return page.evaluate(f"() => [{theme}, {colour}]")

    page.goto(served)
    light = look()
    page.get_by_role("button", name="Color mode").click()
    page.get_by_role("button", name="Dark").click()
    dark = look()
    assert light[0] == "light" and dark[0] == "dark" and light[1] != dark[1]
    page.goto(served + "course/figures.html")
    assert look() == dark


@pytest.mark.browser
def test_the_colab_button_opens_the_right_notebook(page, served):
    for nb in NOTEBOOKS:
        badge = [o for o in map(source, cells(nb)) if BADGES.fullmatch(o)]
        page.goto(served + page_name(nb) + ".html")
        button = page.get_by_role("link", name="Open in Colab")
        assert button.count() == len(badge), nb
        if badge:
            target = f"https://colab.research.google.com/github/{address().repo}/blob/main/nbs/{nb}"
            assert button.get_attribute("href") == target


@pytest.mark.browser
def test_the_reference_shows_docments(page, served):
    from fastcore.docments import docments
    from sota_course.course import figures

    page.goto(served + "api/course.figures.html")
    for f in figures.__all__:
        entry = page.locator(f"dl.py:has([id='sota_course.course.figures.{f}'])")
        shown = [o.replace("’", "'") for o in entry.locator("tr").all_inner_texts()]
        for name, words in docments(getattr(figures, f)).items():
            words = (words or "").replace("`", "")
            rows = [o for o in shown if o.startswith(name) and words in o]
            assert rows or not words, f"{f}: {name}"


@pytest.mark.browser
def test_the_site_works_from_a_folder(browser, site):
    page = new_page(browser)
    wrong = watch(page, "file://")
    page.goto((site / "index.html").as_uri())
    page.locator("a.right-next").click()
    page.wait_for_load_state()
    assert page.title() != "" and not page.url.endswith("/index.html")
    assert page.locator("article h1").count() == 1
    assert not wrong
    page.close()
