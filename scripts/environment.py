"""Make the checkout's own environment, `.venv`, and install what a command needs, if it isn't there yet.

    python3 scripts/environment.py [--extras dev,bench] [--torch "torch==… torchvision==…"] [--chromium]
    python3 scripts/environment.py --venv .venv-oldest --pins oldest --also pytest
    python3 scripts/environment.py --venv .venv-colab --pins scripts/colab.txt --also pytest

It needs nothing but Python, on Windows too. `--pins` holds requirements to exact versions: those in a file, or with
`oldest` the lower bounds of `settings.ini`, all at once. What was installed is remembered by content, not by date: the files that decide it, the
requirements given here, Python's version, and the folder. So a second run does nothing, a changed requirement is
installed, and an environment that another Python or another folder made, or whose making was cut short, is made
anew. A `.venv` that something else made is only added to.
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

root = Path(__file__).resolve().parent.parent
BIN = "Scripts" if os.name == "nt" else "bin"
venv = root / ".venv"
python = venv / BIN / "python"
state = venv / ".sota_course"
DECIDE = (
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "scripts/environment.py",
    "scripts/torchvision_cpu.py",
)
# Inherited, these would send packages elsewhere or mix in others.
ELSEWHERE = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "PIP_USER",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "__PYVENV_LAUNCHER__",
)
PINS = "pins.txt"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class SetupError(Exception):
    "What went wrong, and what to do about it."


def clean_env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ELSEWHERE}


def made_by() -> dict:
    "What an environment depends on from its first moment: it can't be changed later."
    return {"python": sys.version, "base": sys.base_prefix, "folder": str(root)}


def wanted(what: dict) -> dict:
    "What the installation of `what` depends on."
    return (
        {o: hashlib.sha256((root / o).read_bytes()).hexdigest() for o in DECIDE} | what | made_by()
    )


def pinned(pins: str) -> str:
    "The lines `name==version` that `pins` stands for: a file, or `oldest` for the lower bounds of `settings.ini`."
    if not pins:
        return ""
    if pins != "oldest":
        return (root / pins).read_text(encoding="utf-8")
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["requirements"].strip().replace(">=", "==") + "\n"


def read(name: str):
    return json.loads(path.read_text()) if (path := state / name).exists() else None


def write(name: str, value):
    state.mkdir(exist_ok=True)
    part = state / f"{name}.part"
    part.write_text(json.dumps(value))
    part.replace(state / name)


@contextlib.contextmanager
def alone():
    "Two commands started at once set up one after the other. The lock is on the folder itself: it leaves no file."
    if fcntl is None:
        yield
        return
    fd = os.open(root, os.O_RDONLY)
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


def apt() -> bool:
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def apt_install(*packages: str):
    "Install Debian packages: `SetupError` if that fails."
    env = clean_env() | {"DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"]
    for cmd in ([*get, "update"], [*get, "install", "-y", "--no-install-recommends", *packages]):
        run = subprocess.run(cmd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if run.returncode:
            raise SetupError(f"{shlex.join(cmd)} failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")


def has_venv() -> bool:
    "Debian's Python comes without what makes environments: it is in a package of its own."
    return (
        subprocess.run(
            [sys.executable, "-c", "import venv, ensurepip"], capture_output=True
        ).returncode
        == 0
    )


def make():
    "A new, empty environment."
    if not has_venv():
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        if apt() and sys.base_prefix == "/usr":
            with step(f"installing {package}"):
                apt_install(package)
        if not has_venv():
            raise SetupError(
                f"{sys.executable} can't make virtual environments: its modules venv or ensurepip are missing.\n"
                f"On Debian and Ubuntu: sudo apt-get install {package}; or name another Python: make PYTHON=…"
            )
    if venv.is_symlink() or venv.is_file():
        raise SetupError(f"{venv} is not a folder: move it away")
    # Inside an activated .venv this runs in the very environment that it replaces: make the new one from that one's base.
    base = getattr(sys, "_base_executable", None) or sys.executable
    shutil.rmtree(venv, ignore_errors=True)
    with step(f"making .venv with Python {sys.version.split()[0]}"):
        run = subprocess.run(
            [base, "-m", "venv", str(venv)], env=clean_env(), capture_output=True, text=True
        )
        if run.returncode:
            raise SetupError(f"no virtual environment could be made:\n{run.stdout}{run.stderr}")
    write("made.json", made_by())


def usable() -> bool:
    "Is there an environment to install into: whole, of this Python and this folder, or somebody else's that works?"
    if not python.exists():
        return False
    made = read("made.json")
    if made is not None:
        return made == made_by() and not (state / "installing").exists()
    asked = subprocess.run(
        [python, "-c", "import sys; print(*sys.version_info[:2])"],
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    if asked.returncode == 0 and asked.stdout.split() == [str(o) for o in sys.version_info[:2]]:
        return True
    raise SetupError(
        f"{venv} was made by something else, for another Python, or is broken: delete it, or name its Python with make PYTHON=…"
    )


def pip(*args: str):
    "Quiet unless it fails."
    cmd = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--retries",
        "10",
        "--disable-pip-version-check",
        *args,
    ]
    if subprocess.run(cmd, env=clean_env(), cwd=root).returncode:
        raise SetupError(f"pip could not install {' '.join(args)}: see above")


def install(extras: str, torch: str, pins: str, also: str):
    """Install the checkout, editable, with `extras`, the builds of torch given in `torch`, and `also`, at the versions in `pins`.
    A kill in the middle leaves a mark, from which the next run starts anew; pip's own failure undoes itself."""
    mark = state / "installing"
    state.mkdir(exist_ok=True)
    mark.touch()
    try:
        if torch:
            with step(f"installing {torch}"):
                pip(*shlex.split(torch))
        (state / PINS).write_text(pins)
        with step(
            f"installing sota_course and its requirements ({extras}), a few minutes the first time"
        ):
            pip(
                "--editable",
                f"{root}[{extras}]" if extras else str(root),
                *shlex.split(f"{torch} {also}"),
                "--constraint",
                str(state / PINS),
            )
        fix = subprocess.run([python, root / "scripts" / "torchvision_cpu.py"], env=clean_env())
        if fix.returncode:
            raise SetupError("torchvision does not import: see above")
    except SetupError:
        mark.unlink()
        raise
    mark.unlink()


def find_chromium() -> str | None:
    "Chromium's executable: `SOTA_COURSE_CHROMIUM`, or what the system has."
    return os.environ.get("SOTA_COURSE_CHROMIUM") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )


def chromium():
    "Chromium from Debian's packages, where that is possible; the browser tests skip without one."
    if find_chromium():
        return
    skip = "the browser tests will be skipped"
    if not apt():
        return print(
            f"set-up: no Chromium here, and it can't be installed (that takes root and apt-get): {skip}",
            flush=True,
        )
    try:
        with step("installing Chromium for the browser tests"):
            apt_install("chromium", "fonts-dejavu-core")
    except SetupError as e:
        print(f"set-up: {skip}: {e}", flush=True)


def ensure(extras: str, torch: str, pins: str = "", also: str = ""):
    "Bring the environment to what is wanted, doing only what is missing."
    what = {"extras": extras, "torch": torch, "pins": pinned(pins), "also": also}
    with alone():
        if not usable():
            make()
        name, want = f"ready-{extras or 'plain'}.json", wanted(what)
        if read(name) == want:
            return
        (state / name).unlink(missing_ok=True)
        install(**what)
        write(name, want)


def place(name: str):
    "Work on the environment `name` in place of `.venv`."
    global venv, python, state
    venv = root / name
    python, state = venv / BIN / "python", venv / ".sota_course"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--extras", default="dev", help="extras in settings.ini, with commas between"
    )
    parser.add_argument(
        "--torch", default="", help="builds of torch to install first: pip requirements"
    )
    parser.add_argument(
        "--venv", default=".venv", help="folder of the environment, in the checkout"
    )
    parser.add_argument("--pins", default="", help="a file of exact versions, or oldest")
    parser.add_argument("--also", default="", help="more pip requirements")
    parser.add_argument(
        "--chromium", action="store_true", help="also see to a browser for the tests"
    )
    args = parser.parse_args()
    place(args.venv)
    try:
        ensure(args.extras, args.torch, args.pins, args.also)
        if args.chromium:
            chromium()
    except SetupError as e:
        sys.exit(f"set-up failed: {e}")


if __name__ == "__main__":
    main()
