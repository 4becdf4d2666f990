"One command writes every link to the repository and the site, from the address in pyproject.toml."

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import links

# In two parts, for moving back from it must not rewrite this file.
NEW = links.Address("someone-else/" + "a.fork", "https://docs." + "example.org/the/course/")


def run(root, *args):
    return subprocess.run(
        [sys.executable, root / "scripts/links.py", *args], cwd=root, capture_output=True, text=True
    )


def text_files(root):
    return {
        o.relative_to(root).as_posix(): o.read_text(encoding="utf-8")
        for o in [
            *links.tracked(root),
            root / "pyproject.toml",
            *(root / "sota_course").rglob("*.py"),
        ]
    }


@pytest.fixture
def copy(tmp_path):
    "A copy of this checkout's files, as a repository of its own."
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for o in filter(lambda o: o and (ROOT / o).is_file(), names):
        (tmp_path / o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / o, tmp_path / o)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def rename(root, old, new):
    path = root / "pyproject.toml"
    path.write_text(path.read_text().replace(old.github, new.github).replace(old.docs, new.docs))


def test_links_are_up_to_date():
    ran = run(ROOT, "--check")
    assert ran.returncode == 0, ran.stderr


def test_a_new_address_changes_every_link_and_nothing_else(copy):
    near = "https://github.com/{}-extras {} and https://github.com/{}.git, {}more\n"
    old = links.address(ROOT)
    (copy / "notes.md").write_text(
        near.format(old.repo, "https://github.com/someone/sota_course", old.repo, old.docs)
    )
    before = text_files(copy)
    rename(copy, old, NEW)
    assert run(copy, "--check").returncode
    assert (ran := run(copy)).returncode == 0, ran.stderr
    after = text_files(copy)
    assert after["notes.md"] == near.format(
        old.repo, "https://github.com/someone/sota_course", NEW.repo, NEW.docs
    )
    stale = [
        name
        for name, text in after.items()
        if name != "notes.md" and re.search(re.escape(old.repo) + r"(?![\w-])", text)
    ]
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
    made = [
        o
        for o in json.loads((copy / "nbs/pictures.ipynb").read_text())["cells"]
        if links.BADGES.fullmatch(links.source(o))
    ]
    assert (
        len(made) == 1
        and "/nbs/pictures.ipynb)" in links.source(made[0])
        and "/pictures.html)" in links.source(made[0])
    )
    assert links.former(copy) == {links.address(ROOT)}


def test_badges_stand_under_the_title():
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        nb = json.loads(path.read_text(encoding="utf-8"))
        if not links.runs_alone(nb):
            continue
        assert links.source(nb["cells"][0]).startswith("# "), path
        assert links.BADGES.fullmatch(links.source(nb["cells"][1])), path


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
    nb = dict(
        cells=[
            dict(cell_type="markdown", id="a", metadata={}, source=["# Title"]),
            dict(
                cell_type="code",
                id="b",
                metadata={},
                outputs=[],
                execution_count=None,
                source=code.splitlines(keepends=True),
            ),
        ]
    )
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
        '[project.urls]\nRepository = "https://git.example.org/a/b"\nDocumentation = "https://a.example.org"\n'
    )
    with pytest.raises(ValueError, match="github.com/<owner>/<name>"):
        links.address(tmp_path)


def test_relative_links_become_full_ones_outside_code():
    made = links.absolute(
        "[a](../LICENSE) [b](00_x.ipynb#y) [c](https://e.org/) [d](#here) `[e](f)`\n```\n[g](h)\n```\n",
        "nbs",
        NEW,
    )
    assert made == (
        f"[a]({NEW.github}/blob/main/LICENSE) [b]({NEW.github}/blob/main/nbs/00_x.ipynb#y) [c](https://e.org/) [d](#here) "
        "`[e](f)`\n```\n[g](h)\n```\n"
    )


def test_outside_links_are_listed():
    listed = run(ROOT, "--urls").stdout.split()
    assert "https://github.com/fastai/imagenette" in listed
    assert listed == sorted(set(listed)) and not [o for o in listed if "127.0.0.1" in o]
