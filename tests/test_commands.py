"What people type: `make …` on a fresh clone, a second time, and where something is missing."

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import course
import environment
from environment import Environment
from links import ROOT
from sota_course.training.options import read_options
from sota_course.training.recipes import preset

TARGETS = "course lab test test-oldest test-colab test-newest docs bench help".split()


def make(*args, cwd=ROOT, **env):
    "Run `make` as from a shell, also where a `make` runs these tests."
    from_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "TORCH")
    inherited = {k: v for k, v in os.environ.items() if k not in from_make}
    env = {k: str(v) for k, v in (inherited | {"PYTHON": sys.executable} | env).items()}
    return subprocess.run(
        ["make", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    "The project without its requirements, at a path with spaces: set up in seconds."
    folder = tmp_path / "a folder with spaces"
    names = """Makefile pyproject.toml setup.py settings.ini README.md LICENSE
        scripts sota_course results""".split()
    for name in names:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder / name)
    settings = folder / "settings.ini"
    bare = re.sub(r"^(\w*requirements =)\n(?: .+\n)+", r"\1\n", settings.read_text(), flags=re.M)
    settings.write_text(bare)
    return folder


def require(checkout, *requirements):
    "Put `requirements` into the checkout's settings."
    settings = checkout / "settings.ini"
    lines = "".join(f"    {o}\n" for o in requirements)
    text = settings.read_text().replace("\nrequirements =\n", f"\nrequirements =\n{lines}")
    settings.write_text(text)


def setup(folder, **env):
    return make("env", "TORCH=", cwd=folder, **env)


def python(folder, code):
    "What `code` prints in the checkout's environment."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [folder / ".venv" / "bin" / "python", "-c", code]
    done = subprocess.run(
        command, cwd=folder.parent, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_help_names_every_command():
    shown = make(cwd=ROOT).stdout
    for o in TARGETS:
        assert re.search(rf"^make {o} +\S", shown, re.M), o


def test_every_command_sets_up_first():
    for o in set(TARGETS) - {"help"}:
        lines = make("--dry-run", o, PYTHON="python3").stdout.splitlines()
        first = next(i for i, line in enumerate(lines) if re.search(r"\.venv[-\w]*/bin", line))
        assert any("scripts/environment.py" in line for line in lines[:first]), o


def test_course_trains_the_book_s_recipe_and_ours():
    "Its options are read here, and it says how to go on; training takes a minute and more."
    assert "scripts/course.py" in make("--dry-run", "course").stdout
    book, fast = (read_options(o.split()).recipe for o in (course.BOOK, course.FAST))
    assert (book.data, fast.data, book.size, fast.size) == ("drawn", "drawn", 64, 64)
    assert fast == preset("fast", epochs=fast.epochs)
    assert re.search(r"^\s*sota-train\s*=", (ROOT / "settings.ini").read_text(), re.M)


def test_a_fresh_clone(checkout, tmp_path):
    """Another environment is active, HOME is empty, and modules lie about that would break pip:
    none of it matters."""
    (tmp_path / "lies").mkdir()
    (tmp_path / "lies" / "pip.py").write_text("raise SystemExit('the wrong pip')")
    first = setup(
        checkout,
        PYTHONPATH=tmp_path / "lies",
        VIRTUAL_ENV=tmp_path / "other",
        PIP_TARGET=tmp_path / "target",
        HOME="",
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "installing sota_course" in first.stdout
    place = python(checkout, "import sota_course; print(sota_course.__file__)")
    assert place == str(checkout / "sota_course" / "__init__.py")
    assert not (tmp_path / "target").exists()
    # The commands that pip wrote work too, in spite of the spaces.
    pip = subprocess.run([checkout / ".venv/bin/pip", "--version"], capture_output=True)
    assert pip.returncode == 0

    second = setup(checkout)
    assert (second.returncode, second.stdout) == (0, ""), "set up twice"

    require(checkout, "pip>=1")
    assert "installing sota_course" in setup(checkout).stdout, "a new requirement was not installed"
    code = "from importlib.metadata import requires; print(requires('sota_course'))"
    assert python(checkout, code) == "['pip>=1']"
    assert setup(checkout).stdout == ""

    # Made by another Python (its note says so): made anew.
    (checkout / ".venv" / "left over").touch()
    note = checkout / ".venv/.sota_course/made.json"
    note.write_text(note.read_text().replace(sys.version.split()[0], "3.9.0"))
    assert "making .venv" in setup(checkout).stdout
    assert not (checkout / ".venv" / "left over").exists()


def test_an_interrupted_set_up_is_made_anew(checkout):
    command = [sys.executable, "scripts/environment.py"]
    run = subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in run.stdout:
        if "installing sota_course" in line:
            break
    time.sleep(0.5)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    (checkout / ".venv" / "half written").touch()
    again = setup(checkout)
    assert again.returncode == 0 and "making .venv" in again.stdout, again.stdout + again.stderr
    assert not (checkout / ".venv" / "half written").exists()
    assert setup(checkout).stdout == ""


def test_a_failed_install_says_so_and_goes_on_next_time(checkout):
    settings = checkout / "settings.ini"
    text = settings.read_text()
    require(checkout, "pip>=9999")
    failed = setup(checkout)
    assert failed.returncode and "set-up failed: pip could not install" in failed.stderr
    assert "pip>=9999" in failed.stderr
    settings.write_text(text)
    again = setup(checkout)
    assert again.returncode == 0 and "making .venv" not in again.stdout


def test_the_second_of_two_waits(checkout):
    fd = os.open(checkout, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    command = [sys.executable, "scripts/environment.py"]
    run = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True)
    try:
        assert "waiting" in run.stdout.readline()
    finally:
        run.kill()
        run.communicate()
        os.close(fd)
    assert not (checkout / ".venv").exists()


def test_the_oldest_versions_are_the_lower_bounds():
    pins = environment.pinned("oldest").split()
    settings = (ROOT / "settings.ini").read_text()
    assert len(pins) > 4 and "fastai==2.8.8" in pins
    assert all(o.replace("==", ">=") in settings for o in pins)
    assert environment.pinned("scripts/colab.txt").count("==") > 3 and environment.pinned("") == ""


def test_another_version_is_another_environment(monkeypatch):
    "Changed pins are installed: they are part of what is remembered."
    pins = [environment.pinned(o) for o in ("oldest", "scripts/colab.txt")]
    one, two = (environment.wanted({"pins": o}) for o in pins)
    assert one != two


def test_pins_hold(checkout, tmp_path):
    "An environment of its own, with the version that was asked for."
    require(checkout, "iniconfig>=2.0.0")
    command = [sys.executable, "scripts/environment.py", "--venv", ".venv-oldest"]
    command += ["--extras", "", "--pins", "oldest"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0 and not (checkout / ".venv").exists(), done.stdout + done.stderr
    code = "from importlib.metadata import version; print(version('iniconfig'))"
    version = [checkout / ".venv-oldest" / "bin" / "python", "-c", code]
    assert subprocess.run(version, capture_output=True, text=True).stdout.strip() == "2.0.0"


def fake(tmp_path, script):
    path = tmp_path / "python3"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_python_too_old(tmp_path):
    old = fake(tmp_path, 'if [ "$1" = --version ]; then echo Python 3.8.10; else exit 1; fi')
    run = make("env", PYTHON=old)
    assert run.returncode and "PYTHON=" in run.stderr
    assert f"needs Python 3.10 or newer; {old} is Python 3.8.10" in run.stderr


def test_no_python(tmp_path):
    run = make("env", PYTHON=tmp_path / "nowhere")
    assert run.returncode and f'there is no "{tmp_path}/nowhere" here' in run.stderr


def test_no_venv_module(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "has_venv", lambda: False)
    monkeypatch.setattr(environment, "apt", lambda: False)
    with pytest.raises(environment.SetupError, match=r"apt-get install python3\.\d+-venv"):
        Environment(tmp_path / ".venv").make()


def test_a_foreign_environment_is_kept(tmp_path):
    "One that this project did not make is used, if it is of the right Python, and never deleted."
    foreign = Environment(tmp_path / ".venv")
    assert not foreign.usable()
    foreign.python.parent.mkdir(parents=True)
    foreign.python.symlink_to(sys.executable)
    assert foreign.usable()
    foreign.python.unlink()
    fake(tmp_path, "echo 3 9").rename(foreign.python)
    with pytest.raises(environment.SetupError, match="delete it"):
        foreign.usable()


def test_no_chromium(monkeypatch, capsys):
    monkeypatch.setattr(environment, "find_chromium", lambda: None)
    monkeypatch.setattr(environment, "apt", lambda: False)
    environment.chromium()
    assert "browser tests will be skipped" in capsys.readouterr().out


def test_chromium_is_named(monkeypatch):
    monkeypatch.setenv("SOTA_COURSE_CHROMIUM", "/some/where")
    assert environment.find_chromium() == "/some/where"
