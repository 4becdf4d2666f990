"The repository as it is committed: in sync with its notebooks, free of what doesn't belong there, and of one mind."

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from notebooks import files, root
from test_notebooks import MACHINE, PICTURE

LARGEST = 2 * 2**20


def texts():
    for path in files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            pass


def name(path):
    return path.relative_to(root).as_posix()


@pytest.fixture
def copy(tmp_path) -> Path:
    "The committed files in a folder of their own, a repository too."
    for path in files():
        (new := tmp_path / "copy" / path.relative_to(root)).parent.mkdir(
            parents=True, exist_ok=True
        )
        shutil.copy2(path, new)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "copy", check=True)
    return tmp_path / "copy"


def nbdev(command, folder):
    "Run an nbdev command in `folder`, and name the files that it changed there."
    before = {
        p: p.read_bytes()
        for o in ("nbs", "sota_course")
        for p in (folder / o).rglob("*")
        if p.is_file()
    }
    run = subprocess.run(
        [sys.executable, Path(sys.executable).parent / command],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    after = {
        p: p.read_bytes()
        for o in ("nbs", "sota_course")
        for p in (folder / o).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    return [
        p.relative_to(folder).as_posix()
        for p in sorted(before | after)
        if before.get(p) != after.get(p)
    ]


def test_modules_are_exported(copy):
    assert nbdev("nbdev-export", copy) == [], "not in sync with the notebooks: run nbdev-export"


def test_an_edited_module_is_noticed(copy):
    (copy / "sota_course" / "course" / "figures.py").write_text("edited by hand")
    assert "sota_course/course/figures.py" in nbdev("nbdev-export", copy)


def test_notebooks_are_clean(copy):
    assert nbdev("nbdev-clean", copy) == [], "run nbdev-clean"


def tool(folder, *command):
    "What a command of this environment says in `folder`, a repository."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path}
    )


@pytest.mark.parametrize("command", ["ruff format --check", "ruff check"])
def test_ruff(copy, command):
    run = tool(copy, *command.split())
    assert run.returncode == 0, run.stdout + run.stderr


def test_hooks(copy):
    "What git asks before a commit passes here, changes nothing, and turns a bad line away."
    good = tool(copy, "pre-commit", "run", "--all-files")
    assert good.returncode == 0, good.stdout + good.stderr
    path = copy / "scripts" / "bad.py"
    path.write_text("if True: unused = lambda: 0; print(1)\n")
    bad = tool(copy, "pre-commit", "run", "--files", path)
    assert bad.returncode != 0 and "E731" in bad.stdout, bad.stdout + bad.stderr


def test_no_machine_paths():
    found = [
        (name(p), o)
        for p, text in texts()
        if p.suffix in (".ipynb", ".md", ".json", ".csv", ".toml", ".ini", ".cff", ".yml", ".txt")
        for o in MACHINE.findall(PICTURE.sub("", text))
    ]
    assert not found


def test_no_registry():
    "Where packages come from is for each machine's own configuration to say."
    hosts = re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|npmjs\.org|--(?:extra-)?index-url|--find-links|PIP_INDEX_URL"
    )
    found = [
        (name(p), o)
        for p, text in texts()
        if p != Path(__file__).resolve()
        for o in hosts.findall(PICTURE.sub("", text))
    ]
    assert not found


def test_files_are_small():
    assert not [name(p) for p in files() if p.stat().st_size > LARGEST]


def test_results_are_numbers():
    "No photo, model or archive: names alone aren't trusted."
    for path in files():
        if "results" not in path.relative_to(root).parts[:1]:
            continue
        assert path.suffix in (".csv", ".json", ".md"), name(path)
        assert not PICTURE.search(path.read_text(encoding="utf-8")), name(path)


def test_photos_are_not_committed():
    pictures = (
        ".jpg",
        ".jpeg",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".heic",
        ".npy",
        ".npz",
        ".pt",
        ".pth",
        ".pkl",
        ".safetensors",
        ".zip",
        ".tgz",
    )
    assert not [name(p) for p in files() if p.suffix.lower() in pictures]


WORKFLOWS = sorted((root / ".github" / "workflows").glob("*.y*ml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda o: o.name)
def test_workflow(path):
    "Actions are pinned by full version or commit, and get the permissions that they need and no others."
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "permissions" in flow, "says which permissions it needs"
    assert flow["permissions"] in ({}, {"contents": "read"}), (
        "write permissions belong to the one job that needs them"
    )
    for key, job in flow["jobs"].items():
        assert job.get("timeout-minutes"), f"{key} can't hang for hours"
        used = [o["uses"] for o in job.get("steps", []) if "uses" in o]
        loose = [o for o in used if not re.search(r"@(v\d+\.\d+\.\d+|[0-9a-f]{40})$", o)]
        assert not loose, f"not pinned: {loose}"


def test_one_workflow_runs_the_tests():
    jobs = yaml.safe_load((root / ".github/workflows/test.yml").read_text())["jobs"]

    def runs(job, start):
        return any(o.get("run", "").startswith(start) for o in jobs[job]["steps"])

    assert runs("test", "make test PYTHON=") and runs("notebooks", ".venv/bin/nbdev-test")
    assert (
        jobs["test"]["strategy"]["matrix"]["python"]
        == jobs["notebooks"]["strategy"]["matrix"]["python"]
        == ["3.10", "3.11", "3.12", "3.13"]
    )
    assert all(
        runs("systems", o) for o in ("python scripts/environment.py", "nbdev-test", "sota-train")
    )
    assert re.search(r"^cd .* && exec make test$", (root / ".ci/run").read_text(), re.M)


def test_one_place_for_each_fact():
    settings, project, setup = [
        (root / o).read_text(encoding="utf-8")
        for o in ("settings.ini", "pyproject.toml", "setup.py")
    ]
    for key in ("name", "description", "requires-python", "version"):
        assert not re.search(rf"^{key}\s*=", settings, re.M), key
    for key in (
        "dependencies",
        "version",
        "authors",
        "keywords",
        "scripts",
        "classifiers",
        "optional-dependencies",
    ):
        assert not re.search(rf"^{key}\s*=", project, re.M) and f'"{key}"' in project, key
    description = re.search(r'^description = "(.+)"', project, re.M)[1]
    assert not [
        name(p)
        for p, text in texts()
        if p.suffix in (".ini", ".py", ".cff") and description in text
    ]
    version = re.search(r'"(.+)"', (root / "sota_course/__init__.py").read_text())[1]
    assert version not in settings + project + setup


def test_one_address():
    "The address in the citation is the one in pyproject.toml."
    address = re.search(r'^Repository = "(.+)"', (root / "pyproject.toml").read_text(), re.M)[1]
    assert yaml.safe_load((root / "CITATION.cff").read_text())["repository-code"] == address


def test_citation():
    cff = yaml.safe_load((root / "CITATION.cff").read_text())
    assert (
        {"cff-version", "message", "title", "authors"} <= set(cff)
        and cff["authors"]
        and cff["license"] == "Apache-2.0"
    )
