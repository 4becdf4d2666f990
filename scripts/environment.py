"""Make the checkout's own environment, `.venv`, and install what a command needs, where it lacks.

    python3 scripts/environment.py [--extras dev,bench] [--torch "torch==… torchvision==…"]
                                   [--chromium]
    python3 scripts/environment.py --venv .venv-oldest --pins oldest --also pytest
    python3 scripts/environment.py --venv .venv-colab --pins scripts/colab.txt --also pytest

It needs nothing but Python, on Windows too. `--pins` holds requirements to exact versions: those in
a file, or with `oldest` the lower bounds of `settings.ini`, all at once. What was installed is
remembered by content, not by date: the files that decide it, the requirements given here, Python's
version, and the folder. So a second run does nothing, a changed requirement is installed, and an
environment that another Python or another folder made, or whose making was cut short, is made anew.
A `.venv` that something else made is only added to.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
BIN = "Scripts" if os.name == "nt" else "bin"
# The files that decide what is installed
DECIDE = """settings.ini setup.py pyproject.toml
    scripts/environment.py scripts/torchvision_cpu.py""".split()
# Inherited, these would send packages elsewhere or mix in others.
ELSEWHERE = """PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT
    __PYVENV_LAUNCHER__""".split()
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"


class SetupError(Exception):
    "What went wrong, and what to do about it."


def clean_env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ELSEWHERE}


def ask(*command, **env: str) -> subprocess.CompletedProcess:
    "Run a command, unseen, and keep what it says."
    return subprocess.run(
        command, env=clean_env() | env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def pinned(pins: str) -> str:
    """The lines `name==version` that `pins` stands for: a file, or `oldest` for the lower bounds of
    `settings.ini`."""
    if not pins:
        return ""
    if pins != "oldest":
        return (ROOT / pins).read_text(encoding="utf-8")
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["requirements"].strip().replace(">=", "==") + "\n"


def made_by() -> dict:
    "What an environment depends on from its first moment: it can't be changed later."
    return {"python": sys.version, "base": sys.base_prefix, "folder": str(ROOT)}


def wanted(what: dict) -> dict:
    "What the installation of `what` depends on."
    files = {o: hashlib.sha256((ROOT / o).read_bytes()).hexdigest() for o in DECIDE}
    return files | what | made_by()


@contextlib.contextmanager
def alone():
    """Two commands started at once set up one after the other. The lock is on the folder itself:
    it leaves no file."""
    if fcntl is None:
        yield
        return
    fd = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another command is setting up: waiting for it", flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def step(what: str):
    print(f"set-up: {what} …", flush=True)
    start = time.perf_counter()
    yield
    print(f"set-up: {what}: {time.perf_counter() - start:.0f} s", flush=True)


# --- what the system has ---


def apt() -> bool:
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def apt_install(*packages: str):
    "Install Debian packages: `SetupError` if that fails."
    get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"]
    for command in (
        [*get, "update"],
        [*get, "install", "-y", "--no-install-recommends", *packages],
    ):
        done = ask(*command, DEBIAN_FRONTEND="noninteractive")
        if done.returncode:
            said = done.stdout[-2000:] + done.stderr[-2000:]
            raise SetupError(f"{shlex.join(command)} failed:\n{said}")


def has_venv() -> bool:
    "Debian's Python comes without what makes environments: it is in a package of its own."
    return ask(sys.executable, "-c", "import venv, ensurepip").returncode == 0


def need_venv():
    "See to what makes environments: `SetupError` where it is missing and can't be installed."
    if has_venv():
        return
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if apt() and sys.base_prefix == "/usr":
        with step(f"installing {package}"):
            apt_install(package)
    if not has_venv():
        raise SetupError(
            f"{sys.executable} can't make virtual environments: "
            "its modules venv or ensurepip are missing.\n"
            f"On Debian and Ubuntu: sudo apt-get install {package}; "
            "or name another Python: make PYTHON=…"
        )


def find_chromium() -> str | None:
    "Chromium's executable: `SOTA_COURSE_CHROMIUM`, or what the system has."
    found = filter(None, map(shutil.which, BROWSERS))
    return os.environ.get("SOTA_COURSE_CHROMIUM") or next(found, None)


def chromium():
    "Chromium from Debian's packages, where that is possible; the browser tests skip without one."
    if find_chromium():
        return
    try:
        if not apt():
            raise SetupError("no Chromium here, and installing it takes root and apt-get")
        with step("installing Chromium for the browser tests"):
            apt_install("chromium", "fonts-dejavu-core")
    except SetupError as e:
        print(f"set-up: the browser tests will be skipped: {e}", flush=True)


# --- an environment ---


class Environment:
    "The environment in `folder`, with what is remembered of it."

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / BIN / "python"
        self.state = folder / ".sota_course"

    def read(self, name: str):
        path = self.state / name
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, value):
        self.state.mkdir(exist_ok=True)
        part = self.state / f"{name}.part"
        part.write_text(json.dumps(value))
        part.replace(self.state / name)

    def make(self):
        "A new, empty environment."
        need_venv()
        if self.folder.is_symlink() or self.folder.is_file():
            raise SetupError(f"{self.folder} is not a folder: move it away")
        # Inside an activated .venv this runs in the very environment that it replaces: make the
        # new one from that one's base.
        base = getattr(sys, "_base_executable", None) or sys.executable
        shutil.rmtree(self.folder, ignore_errors=True)
        with step(f"making .venv with Python {sys.version.split()[0]}"):
            done = ask(base, "-m", "venv", str(self.folder))
            if done.returncode:
                said = done.stdout + done.stderr
                raise SetupError(f"no virtual environment could be made:\n{said}")
        self.write("made.json", made_by())

    def usable(self) -> bool:
        """Is there an environment to install into: whole, of this Python and this folder, or
        somebody else's that works?"""
        if not self.python.exists():
            return False
        made = self.read("made.json")
        if made is not None:
            return made == made_by() and not (self.state / "installing").exists()
        version = ask(self.python, "-c", "import sys; print(*sys.version_info[:2])")
        if version.returncode == 0 and version.stdout.split() == [*map(str, sys.version_info[:2])]:
            return True
        raise SetupError(
            f"{self.folder} was made by something else, for another Python, or is broken: "
            "delete it, or name its Python with make PYTHON=…"
        )

    def pip(self, *args: str):
        "Quiet unless it fails."
        install = "-m pip install --quiet --no-input --retries 10 --disable-pip-version-check"
        command = [str(self.python), *install.split(), *args]
        if subprocess.run(command, env=clean_env(), cwd=ROOT).returncode:
            raise SetupError(f"pip could not install {' '.join(args)}: see above")

    def install(self, extras: str, torch: str, pins: str, also: str):
        """Install the checkout, editable, with `extras`, the builds of torch given in `torch`, and
        `also`, at the versions in `pins`. A kill in the middle leaves a mark, from which the next
        run starts anew; pip's own failure undoes itself."""
        mark, constraints = self.state / "installing", self.state / "pins.txt"
        self.state.mkdir(exist_ok=True)
        mark.touch()
        try:
            if torch:
                with step(f"installing {torch}"):
                    self.pip(*shlex.split(torch))
            constraints.write_text(pins)
            checkout = f"{ROOT}[{extras}]" if extras else str(ROOT)
            rest = [*shlex.split(f"{torch} {also}"), "--constraint", str(constraints)]
            long = "a few minutes the first time"
            with step(f"installing sota_course and its requirements ({extras}), {long}"):
                self.pip("--editable", checkout, *rest)
            fix = [self.python, ROOT / "scripts" / "torchvision_cpu.py"]
            if subprocess.run(fix, env=clean_env()).returncode:
                raise SetupError("torchvision does not import: see above")
        except SetupError:
            mark.unlink()
            raise
        mark.unlink()

    def ensure(self, extras: str, torch: str, pins: str = "", also: str = ""):
        "Bring the environment to what is wanted, doing only what is missing."
        what = {"extras": extras, "torch": torch, "pins": pinned(pins), "also": also}
        with alone():
            if not self.usable():
                self.make()
            name, want = f"ready-{extras or 'plain'}.json", wanted(what)
            if self.read(name) == want:
                return
            (self.state / name).unlink(missing_ok=True)
            self.install(**what)
            self.write(name, want)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--extras", default="dev", help="extras in settings.ini, with commas between")
    add("--torch", default="", help="builds of torch to install first: pip requirements")
    add("--venv", default=".venv", help="folder of the environment, in the checkout")
    add("--pins", default="", help="a file of exact versions, or oldest")
    add("--also", default="", help="more pip requirements")
    add("--chromium", action="store_true", help="also see to a browser for the tests")
    args = parser.parse_args()
    try:
        Environment(ROOT / args.venv).ensure(args.extras, args.torch, args.pins, args.also)
        if args.chromium:
            chromium()
    except SetupError as e:
        sys.exit(f"set-up failed: {e}")


if __name__ == "__main__":
    main()
