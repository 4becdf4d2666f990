"One command writes every link to the repository and the site, from the address in pyproject.toml."

import json
import re
import shutil
import subprocess
import sys

import pytest

import links
from conftest import copy_checkout
from links import ROOT
from notebooks import notebooks

# In two parts, for moving back from it must not rewrite this file.
NEW = links.Address("someone-else/" + "a.fork", "https://docs." + "example.org/the/course/")


def run(root, *args):
    command = [sys.executable, root / "scripts/links.py", *args]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def text_files(root):
    made = [root / "pyproject.toml", *(root / "sota_course").rglob("*.py")]
    paths = [*links.tracked(root), *made]
    return {o.relative_to(root).as_posix(): o.read_text(encoding="utf-8") for o in paths}


@pytest.fixture
def copy(tmp_path):
    "A copy of this checkout's files, as a repository of its own."
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return copy_checkout(tmp_path)


def rename(root, old, new):
    path = root / "pyproject.toml"
    path.write_text(path.read_text().replace(old.github, new.github).replace(old.docs, new.docs))


def test_links_are_up_to_date():
    ran = run(ROOT, "--check")
    assert ran.returncode == 0, ran.stderr


def test_a_new_address_changes_every_link_and_nothing_else(copy):
    near = "https://github.com/{}-extras {} and https://github.com/{}.git, {}more\n"
    old = links.address(ROOT)
    other = "https://github.com/someone/sota_course"
    (copy / "notes.md").write_text(near.format(old.repo, other, old.repo, old.docs))
    before = text_files(copy)
    rename(copy, old, NEW)
    assert run(copy, "--check").returncode
    ran = run(copy)
    assert ran.returncode == 0, ran.stderr
    after = text_files(copy)
    assert after["notes.md"] == near.format(old.repo, other, NEW.repo, NEW.docs)
    former = re.compile(re.escape(old.repo) + r"(?![\w-])")
    stale = [k for k, text in after.items() if k != "notes.md" and former.search(text)]
    assert not stale, f"the former address is left in {stale}"
    assert run(copy, "--check").returncode == 0
    assert run(copy).stdout == "" and text_files(copy) == after
    rename(copy, NEW, old)
    assert run(copy).returncode == 0
    assert text_files(copy) == before


def test_a_notebook_that_moved_gets_its_own_badges(copy):
    shutil.move(copy / "nbs/course/figures.ipynb", copy / "nbs/pictures.ipynb")
    ran = run(copy, "--check")
    assert ran.returncode and "nbs/pictures.ipynb" in ran.stderr
    run(copy)
    cells = json.loads((copy / "nbs/pictures.ipynb").read_text())["cells"]
    (badges,) = [o for o in map(links.source, cells) if links.BADGES.fullmatch(o)]
    assert "/nbs/pictures.ipynb)" in badges and "/pictures.html)" in badges
    assert links.former(copy) == {links.address(ROOT)}


def test_badges_stand_under_the_title():
    for path in notebooks():
        nb = json.loads(path.read_text(encoding="utf-8"))
        if not links.runs_alone(nb):
            continue
        assert links.source(nb["cells"][0]).startswith("# "), path
        assert links.BADGES.fullmatch(links.source(nb["cells"][1])), path


@pytest.mark.parametrize("place", range(6))
def test_badges_are_known_again_when_one_comes_or_goes(place):
    lines = links.badges("course/x.ipynb", NEW).splitlines()
    fewer = [o for i, o in enumerate(lines) if i != place or "Colab" in o or "site" in o]
    lines.insert(place, "[![Tests](https://e.org/tests.svg)](https://e.org/tests)")
    for text in map("\n".join, (lines, fewer)):
        found = links.BADGES.fullmatch(text)
        assert found["repo"] == NEW.repo and found["nb"] == "course/x.ipynb"
        assert found["page"] == NEW.page("course/x.ipynb")


@pytest.mark.parametrize(
    "code,alone",
    [
        ("import numpy", True),
        ("from sota_course.data import get_data", False),
        ("%pip install -q sota_course\nimport sota_course", True),
        ("# sota_course", True),
    ],
)
def test_only_a_notebook_that_runs_alone_has_badges(code, alone):
    title = dict(cell_type="markdown", id="a", metadata={}, source=["# Title"])
    lines = code.splitlines(keepends=True)
    ran = dict(cell_type="code", id="b", metadata={}, outputs=[], execution_count=None)
    nb = dict(cells=[title, ran | dict(source=lines)])
    made = links.with_badges(nb, "x.ipynb", NEW)
    assert len(made["cells"]) == (3 if alone else 2)
    assert links.with_badges(made, "x.ipynb", NEW) == made


@pytest.mark.parametrize(
    "name",
    [
        "00_data.ipynb",
        "index.ipynb",
        "course/figures.ipynb",
        "a/10b_Name.ipynb",
        "course/2_x_y.ipynb",
    ],
)
def test_pages_are_named_as_nbdev_names_them(name):
    from nbdev.config import nbpath2html

    assert links.page_name(name) + ".html" == nbpath2html(name).as_posix()


def test_an_address_that_no_badge_can_open_is_refused(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        "[project.urls]\n"
        'Repository = "https://git.example.org/a/b"\n'
        'Documentation = "https://a.example.org"\n'
    )
    with pytest.raises(ValueError, match="github.com/<owner>/<name>"):
        links.address(tmp_path)


def test_relative_links_become_full_ones_outside_code():
    kept = "[c](https://e.org/) [d](#here) `[e](f)`\n```\n[g](h)\n```\n"
    made = links.absolute("[a](../LICENSE) [b](00_x.ipynb#y) " + kept, "nbs", NEW)
    main = f"{NEW.github}/blob/main"
    assert made == f"[a]({main}/LICENSE) [b]({main}/nbs/00_x.ipynb#y) {kept}"


def test_outside_links_are_listed():
    listed = run(ROOT, "--urls").stdout.split()
    assert "https://github.com/fastai/imagenette" in listed
    assert listed == sorted(set(listed)) and not [o for o in listed if "127.0.0.1" in o]
