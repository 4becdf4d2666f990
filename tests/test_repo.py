"The repository as committed: in sync with its notebooks, free of what doesn't belong, of one mind."

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import copy_checkout
from links import ROOT, files
from test_notebooks import MACHINE, PICTURE, parsed

LARGEST = 2 * 2**20


def texts():
    for path in files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            pass


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def copy(tmp_path) -> Path:
    "The committed files in a folder of their own, a repository too."
    folder = copy_checkout(tmp_path / "copy")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def contents(folder):
    "The files of notebooks and modules, by their name in `folder`."
    paths = [p for o in ("nbs", "sota_course") for p in (folder / o).rglob("*") if p.is_file()]
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in paths
        if "__pycache__" not in p.parts
    }


def nbdev(command, folder):
    "Run an nbdev command in `folder`, and name the files that it changed there."
    before = contents(folder)
    command = [sys.executable, Path(sys.executable).parent / command]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    after = contents(folder)
    return [o for o in sorted(before | after) if before.get(o) != after.get(o)]


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
    env = os.environ | {"PATH": path}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)


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


def python_code():
    "All code but the exported: a name for each file or cell, and its syntax tree."
    for path in files():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "sota_course":
            yield name(path), ast.parse(path.read_text(encoding="utf-8"))
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            for cell in [o for o in cells if o["cell_type"] == "code"]:
                yield f"{name(path)}, cell {cell['id']}", parsed("".join(cell["source"]))


def is_text(node):
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def is_truth(node):
    "A comparison, `not …`, or what `bool` makes."
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "bool"
    negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return negated or isinstance(node, (ast.Compare, ast.BoolOp))


def dense(tree):
    """What a reader has to unfold, with its line: a conditional expression within another, a walrus
    that is neither the whole test of an if or while nor in a comprehension's condition, a text
    times a truth."""
    nodes = list(ast.walk(tree))
    tests = {id(o.test) for o in nodes if isinstance(o, (ast.If, ast.While))}
    conditions = [c for o in nodes if isinstance(o, ast.comprehension) for c in o.ifs]
    allowed = tests | {id(o) for c in conditions for o in ast.walk(c)}
    for node in nodes:
        if isinstance(node, ast.IfExp):
            inner = [o for part in ast.iter_child_nodes(node) for o in ast.walk(part)]
            if any(isinstance(o, ast.IfExp) for o in inner):
                yield node.lineno, "a conditional expression within another"
        if isinstance(node, ast.NamedExpr) and id(node) not in allowed:
            yield node.lineno, "a walrus within an expression"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if is_text(one) and is_truth(other):
                    yield node.lineno, "a text times a truth"


def test_code_is_not_dense():
    found = [f"{place}, line {n}: {what}" for place, o in python_code() for n, what in dense(o)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code, count",
    [
        ("x = 1 if a else 2 if b else 3", 1),
        ("x = (1 if a else 2) + (3 if b else 4)", 0),
        ("if y := f(): pass", 0),
        ("if (y := f()) > 2: pass", 1),
        ("while not (y := f()): pass", 1),
        ("x = [y for o in z if (y := f(o))]", 0),
        ("x = [(y := f(o)) for o in z]", 1),
        ("'s' * (n > 1), (n != 1) * f'{s}', 's' * bool(n), 's' * (not n)", 4),
        ("'-' * n, [1] * (n > 1)", 0),
    ],
)
def test_dense_code_is_found(code, count):
    assert len(list(dense(ast.parse(code)))) == count


# What a committed text may be searched for: the pictures in a notebook are no words.
TEXTS = ".ipynb .md .json .csv .toml .ini .cff .yml .txt".split()
HOSTS = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|npmjs\.org"
    r"|--(?:extra-)?index-url|--find-links|PIP_INDEX_URL"
)


def occurrences(pattern, keep):
    return [
        (name(p), o)
        for p, text in texts()
        if keep(p)
        for o in pattern.findall(PICTURE.sub("", text))
    ]


def test_no_machine_paths():
    assert not occurrences(MACHINE, lambda path: path.suffix in TEXTS)


def test_no_registry():
    "Where packages come from is for each machine's own configuration to say."
    assert not occurrences(HOSTS, lambda path: path != Path(__file__).resolve())


def test_files_are_small():
    assert not [name(p) for p in files() if p.stat().st_size > LARGEST]


def test_results_are_numbers():
    "No photo, model or archive: names alone aren't trusted."
    for path in files():
        if "results" not in path.relative_to(ROOT).parts[:1]:
            continue
        assert path.suffix in (".csv", ".json", ".md"), name(path)
        assert not PICTURE.search(path.read_text(encoding="utf-8")), name(path)


def test_photos_are_not_committed():
    photos = ".jpg .jpeg .webp .bmp .tif .tiff .heic".split()
    arrays = ".npy .npz .pt .pth .pkl .safetensors .zip .tgz".split()
    assert not [name(p) for p in files() if p.suffix.lower() in photos + arrays]


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda o: o.name)
def test_workflow(path):
    """Actions are pinned by full version or commit, and get the permissions that they need and no
    others."""
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "permissions" in flow, "says which permissions it needs"
    given = flow["permissions"] in ({}, {"contents": "read"})
    assert given, "write permissions belong to the one job that needs them"
    for key, job in flow["jobs"].items():
        assert job.get("timeout-minutes"), f"{key} can't hang for hours"
        used = [o["uses"] for o in job.get("steps", []) if "uses" in o]
        loose = [o for o in used if not re.search(r"@(v\d+\.\d+\.\d+|[0-9a-f]{40})$", o)]
        assert not loose, f"not pinned: {loose}"


def test_one_workflow_runs_the_tests():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]

    def runs(job, start):
        return any(o.get("run", "").startswith(start) for o in jobs[job]["steps"])

    assert runs("test", "make test PYTHON=") and runs("notebooks", ".venv/bin/nbdev-test")
    pythons = [jobs[o]["strategy"]["matrix"]["python"] for o in ("test", "notebooks")]
    assert pythons == [["3.10", "3.11", "3.12", "3.13"]] * 2
    for o in ("python scripts/environment.py", "nbdev-test", "sota-train"):
        assert runs("systems", o), o
    assert re.search(r"^cd .* && exec make test$", (ROOT / ".ci/run").read_text(), re.M)


def test_one_place_for_each_fact():
    facts = ("settings.ini", "pyproject.toml", "setup.py")
    settings, project, setup = [(ROOT / o).read_text(encoding="utf-8") for o in facts]
    for key in ("name", "description", "requires-python", "version"):
        assert not re.search(rf"^{key}\s*=", settings, re.M), key
    dynamic = """dependencies version authors keywords scripts classifiers
        optional-dependencies""".split()
    for key in dynamic:
        assert not re.search(rf"^{key}\s*=", project, re.M) and f'"{key}"' in project, key
    words = re.search(r'^description = "(.+)"', project, re.M)[1]
    again = [p for p, text in texts() if p.suffix in (".ini", ".py", ".cff") and words in text]
    assert not again
    version = re.search(r'"(.+)"', (ROOT / "sota_course/__init__.py").read_text())[1]
    assert version not in settings + project + setup


def test_one_address():
    "The address in the citation is the one in pyproject.toml."
    address = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == address


def test_citation():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cff) and cff["authors"]
    assert cff["license"] == "Apache-2.0"
