"What the tests share: caches of their own, copies, a browser, real photos, times of the notebooks."

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

from environment import find_chromium
from links import ROOT, files

# Where libraries keep what they fetch, draw or remember. None of it may come from, or land in, the
# user's own folders.
CACHES = """SOTA_COURSE_HOME FASTAI_HOME TORCH_HOME HF_HOME XDG_CACHE_HOME MPLCONFIGDIR IPYTHONDIR
    JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR
    JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR""".split()
# Property tests: the same examples at every run, few enough for `make test`. Many more, and new
# ones each time, with make test ARGS="--hypothesis-profile thorough -k propert"
hypothesis.settings.register_profile("make", max_examples=40, derandomize=True, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("make")
# Slower than this, and a notebook no longer is something to play with.
SECONDS = 60
PHOTOS = "imagenette2-160sq", "flowers5"
home = pytest.StashKey[Path]()


def pytest_configure(config):
    """Before any test module is imported: some libraries look at these variables only then.
    Kernels, commands and xdist's workers inherit them."""
    if hasattr(config, "workerinput"):
        return
    config.stash[home] = folder = Path(tempfile.mkdtemp(prefix="sota_course"))
    for o in CACHES:
        (folder / o.lower()).mkdir()
        os.environ[o] = str(folder / o.lower())
    for o in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "MPLBACKEND"):
        os.environ.pop(o, None)
    # The same on every machine, since results of sums in parallel depend on the number of threads;
    # one, since tests run side by side.
    for o in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[o] = "1"


def pytest_unconfigure(config):
    if home in config.stash:
        shutil.rmtree(config.stash[home], ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    "The seconds of each notebook, slowest first."
    times = []
    for key in ("passed", "failed"):
        for o in terminalreporter.getreports(key):
            seconds = dict(o.user_properties).get("seconds")
            if seconds is not None:
                times.append((seconds, o.nodeid.split("[")[-1].rstrip("]")))
    if times:
        terminalreporter.section("notebooks")
    for seconds, name in sorted(times, reverse=True):
        slow = "  (too slow)" if seconds > SECONDS else ""
        terminalreporter.line(f"{seconds:6.1f} s  {name}{slow}")


def copy_checkout(folder: Path) -> Path:
    "Copy the committed files to `folder`, and nothing that lies beside them."
    for path in files():
        new = folder / path.relative_to(ROOT)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, new)
    return folder


@pytest.fixture(scope="session")
def browser():
    "Chromium, driven by Playwright and kept off the network; where there is none, tests skip."
    path = find_chromium()
    if not path:
        pytest.skip("no Chromium: install it, or name its executable with SOTA_COURSE_CHROMIUM")
    from playwright.sync_api import sync_playwright

    names = """no-sandbox no-first-run metrics-recording-only disable-background-networking
        disable-component-update disable-sync disable-default-apps disable-domain-reliability
        disable-dev-shm-usage""".split()
    hosts = "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
    quiet = [*(f"--{o}" for o in names), f"--host-resolver-rules={hosts}"]
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def photos() -> Path:
    "The folder with the real photos in `PHOTOS`, where `SOTA_COURSE_PHOTOS` names it."
    given = os.environ.get("SOTA_COURSE_PHOTOS")
    if not given:
        pytest.skip(
            f"no real photos: SOTA_COURSE_PHOTOS names no folder with {' and '.join(PHOTOS)}"
        )
    # A wrong path is a mistake, not a reason to skip.
    missing = [o for o in PHOTOS if not (Path(given) / o).is_dir()]
    assert not missing, f"SOTA_COURSE_PHOTOS is {given}, which has no {' and no '.join(missing)}"
    return Path(given)
