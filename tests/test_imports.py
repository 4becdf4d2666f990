"Imports point one way, in pyproject.toml's order; a technique brings nothing but torch and numpy."

import ast
import importlib.util
import subprocess
import sys

import pytest

from links import ROOT

PACKAGE = "sota_course"
PATHS = {
    ".".join(o.relative_to(ROOT).with_suffix("").parts): o
    for o in sorted((ROOT / PACKAGE).rglob("*.py"))
    if not o.name.startswith("_")
}
PURE = "core", "normalize", "resize", "tta", "mixup", "label_smoothing"
HEAVY = "fastai", "fastcore", "pandas", "matplotlib", "PIL", "IPython"

# What a module may import inside a function, and why it isn't at the top.
LATE = {
    "course.exercises": {"sota_course.course.answers"},  # it imports this module, and all chapters
    "course.figures": {"ipywidgets"},  # sliders only
    "images.check": {"fastprogress"},  # so are the next two: a bar, where one is asked for
    "images.drawn": {"fastprogress"},
    "images.fetch": {"fastprogress", "fastdownload", "fastai"},  # fastai: its addresses and folders
    "training.command": {"fastcore", "sota_course.training.session"},  # a quick start
    "training.metrics": {"matplotlib"},  # one diagram
}


def test_the_contracts_are_kept():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def layers():
    "The modules that the contract puts in order."
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text.split("layers = [")[1].split("\n]")[0]
    return [o.strip() for o in text.replace('"', "").replace("|", ",").split(",") if o.strip()]


def test_every_module_has_its_layer():
    assert sorted(layers()) == sorted(PATHS)


def imports(tree, module, package):
    "Of a syntax tree: each imported module in full, with the name that is taken from it, if any."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for o in node.names:
                yield o.name, ""
        elif isinstance(node, ast.ImportFrom):
            full = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for o in node.names:
                yield full, o.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).strip("'\""), ""


@pytest.mark.parametrize("module", PATHS)
def test_no_private_name_of_another_module_is_imported(module):
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    found = [
        f"{o}.{name}"
        for o, name in imports(tree, module, module.rpartition(".")[0])
        if o.startswith(PACKAGE) and name.startswith("_")
    ]
    assert not found


@pytest.mark.parametrize("module", PATHS)
def test_imports_inside_functions_are_those_that_are_listed(module):
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    functions = [o for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.Lambda))]
    found = {o for f in functions for o, _ in imports(f, module, module.rpartition(".")[0])}
    allowed = LATE.get(module.partition(".")[2], set())
    assert not {o for o in found if not {o, o.partition(".")[0]} & allowed}


@pytest.mark.parametrize("name", PURE)
def test_a_technique_brings_no_library_but_torch(name):
    code = f"import sys, {PACKAGE}.{name}; print(*[o for o in {HEAVY} if o in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()
