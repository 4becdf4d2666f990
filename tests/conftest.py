"What the tests share: caches of their own, a browser, real photos where there are some, and times of the notebooks."

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from environment import find_chromium

# Where libraries keep what they fetch, draw or remember. None of it may come from, or land in, the user's own folders.
CACHES = (
    "SOTA_COURSE_HOME",
    "FASTAI_HOME",
    "TORCH_HOME",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "MPLCONFIGDIR",
    "IPYTHONDIR",
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
)
# Property tests: the same examples at every run, few enough for `make test`. Many more, and new ones each time, with
# make test ARGS="--hypothesis-profile thorough -k propert"
hypothesis.settings.register_profile("make", max_examples=40, derandomize=True, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("make")
# Slower than this, and a notebook no longer is something to play with.
SECONDS = 60
home = pytest.StashKey[Path]()


def pytest_configure(config):
    "Before any test module is imported: some libraries look at these variables only then. Kernels, commands and xdist's workers inherit them."
    if hasattr(config, "workerinput"):
        return
    config.stash[home] = folder = Path(tempfile.mkdtemp(prefix="sota_course"))
    for o in CACHES:
        (folder / o.lower()).mkdir()
        os.environ[o] = str(folder / o.lower())
    for o in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "MPLBACKEND"):
        os.environ.pop(o, None)
    # The same on every machine, since results of sums in parallel depend on the number of threads; one, since tests run side by side.
    for o in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[o] = "1"


def pytest_unconfigure(config):
    if home in config.stash:
        shutil.rmtree(config.stash[home], ignore_errors=True)


class ByFile(LoadScopeScheduling):
    "A file's tests share its fixtures, and stay with one worker."

    def _split_scope(self, nodeid):
        return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)  # unknown with -p no:xdist
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter):
    "The seconds of each notebook, slowest first."
    times = sorted(
        (
            (dict(o.user_properties)["seconds"], o.nodeid)
            for key in ("passed", "failed")
            for o in terminalreporter.getreports(key)
            if "seconds" in dict(o.user_properties)
        ),
        reverse=True,
    )
    if not times:
        return
    terminalreporter.section("notebooks")
    for seconds, test in times:
        terminalreporter.line(
            f"{seconds:6.1f} s  {test.split('[')[-1].rstrip(']')}{'  (too slow)' if seconds > SECONDS else ''}"
        )


@pytest.fixture(scope="session")
def browser():
    "Chromium, driven by Playwright and kept off the network; tests that use it skip where there is none."
    path = find_chromium()
    if not path:
        pytest.skip(
            "no Chromium here: install it, or name its executable with SOTA_COURSE_CHROMIUM"
        )
    from playwright.sync_api import sync_playwright

    quiet = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--disable-default-apps",
        "--disable-domain-reliability",
        "--disable-dev-shm-usage",
        "--metrics-recording-only",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    ]
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def photos() -> Path:
    "The folder with the real photos `imagenette2-160sq` and `flowers5`, where `SOTA_COURSE_PHOTOS` names it."
    given = os.environ.get("SOTA_COURSE_PHOTOS")
    if not given:
        pytest.skip(
            "no real photos: SOTA_COURSE_PHOTOS names no folder with imagenette2-160sq and flowers5"
        )
    # A wrong path is a mistake, not a reason to skip.
    missing = [o for o in ("imagenette2-160sq", "flowers5") if not (Path(given) / o).is_dir()]
    assert not missing, f"SOTA_COURSE_PHOTOS is {given}, which has no {' and no '.join(missing)}"
    return Path(given)
