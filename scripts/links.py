"""Write the repository's and the site's address everywhere, from pyproject's `[project.urls]`.

    python scripts/links.py [--check] [--urls]

Each notebook that runs alone gets a line of badges under its title. That line also records which
address was written last: where pyproject says another one now, every full link below the old
address, in any file under git, moves to the new one. `--check` changes nothing, and fails with the
names of the files that it would change. `--urls` lists the outside links of notebooks and
documents, one a line.

Within the repository, notebooks link to files by relative paths; README and site turn those into
full links. It needs nothing but Python and git.
"""

import argparse
import json
import os
import posixpath
import re
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from urllib.parse import quote, unquote

try:
    import tomllib
except ImportError:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"


@dataclass(frozen=True)
class Address:
    "Where the project lives."

    repo: str  # owner/name on GitHub
    docs: str  # the site's address, which ends with a slash

    @property
    def github(self) -> str:
        return f"https://github.com/{self.repo}"

    def blob(self, path: str) -> str:
        return f"{self.github}/blob/{BRANCH}/{quote(path)}"

    def page(self, nb: str) -> str:
        return self.docs + page_name(nb) + ".html"


def pyproject(root: Path = ROOT) -> dict:
    "What pyproject.toml says."
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def address(root: Path = ROOT) -> Address:
    "The address that pyproject names. Raises `ValueError` where no badge could be made from it."
    urls = pyproject(root)["project"]["urls"]
    repo = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)/?", urls["Repository"])
    if not repo:
        raise ValueError(
            f"pyproject.toml: Repository is {urls['Repository']}: Colab, Kaggle and Binder open "
            "https://github.com/<owner>/<name> only"
        )
    return Address(repo[1], urls["Documentation"].rstrip("/") + "/")


def page_name(nb: str) -> str:
    """The page of the notebook `nb` (its path below `nbs`), without .html: nbdev's rule, which
    leaves the number out."""
    folder, name = posixpath.split(nb)
    stem = name.lower().removesuffix(".ipynb")
    return posixpath.join(folder, re.sub(r"^\d+[a-z0-9]*_", "", stem))


def files(root: Path = ROOT) -> list[Path]:
    "What is committed below `root`, or would be with the next commit."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    paths = {root / o for o in out.decode().split("\0") if o}
    return sorted(o for o in paths if o.is_file())


def resolve(target: str, folder: str) -> str | None:
    """The path in the repository that the relative link `target` in `folder` means; None for any
    other link."""
    if re.match(r"[a-z][a-z0-9+.-]*:|/|#", target, re.I):
        return None
    return posixpath.normpath(posixpath.join(folder, target))


LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")


def absolute(text: str, folder: str, at: Address) -> str:
    """`text` (Markdown from a notebook in `folder`) with full links, which also work far from the
    repository."""

    def full(m):
        path, mark, anchor = m[1].partition("#")
        found = resolve(m[1], folder) and resolve(path, folder)
        return at.blob(found) + mark + anchor if found else m[1]

    return outside_code(lambda part: LINK.sub(full, part), text)


def outside_code(change, text: str) -> str:
    """`text` (Markdown) with `change` applied to what stands neither in a code block nor between
    backticks."""
    parts = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", text, flags=re.M | re.S)
    return "".join(o if i % 2 else change(o) for i, o in enumerate(parts))


# --- badges ---

COLAB = "https://colab.research.google.com"
ANY_LINK = r"\[[^\n]*\]\([^)\n]*\)"  # alone on its line
BADGES = re.compile(
    rf"(?:{ANY_LINK}\n)*"
    rf"\[!\[Open in Colab\]\([^)]*\)\]\({re.escape(COLAB)}/github/(?P<repo>[^/]+/[^/]+)/blob/[^/]+"
    r"/nbs/(?P<nb>[^)]*)\)\n"
    rf"(?:{ANY_LINK}\n)*"
    r"\[Read it on the site\]\((?P<page>https?://[^)]*)\)"
    rf"(?:\n{ANY_LINK})*"
)


def badges(nb: str, at: Address) -> str:
    "The line of badges for the notebook `nb`, a path below `nbs`."
    path = "nbs/" + nb

    def badge(where, image, link):
        return f"[![Open in {where}]({image})]({link})"

    colab = f"{COLAB}/github/{at.repo}/blob/{BRANCH}/{quote(path)}"
    kaggle = f"https://kaggle.com/kernels/welcome?src={at.blob(path)}"
    binder = f"https://mybinder.org/v2/gh/{at.repo}/{BRANCH}?urlpath=lab/tree/{quote(path)}"
    lines = [
        badge("Colab", f"{COLAB}/assets/colab-badge.svg", colab),
        badge("Kaggle", "https://kaggle.com/static/images/open-in-kaggle.svg", kaggle),
        badge("Binder", "https://mybinder.org/badge_logo.svg", binder),
        f"[Read it on the site]({at.page(nb)})",
    ]
    return "\n".join(lines)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def runs_alone(nb: dict) -> bool:
    "Whether a notebook copied alone to Colab works: it installs the package, or doesn't import it."
    code = "\n".join(source(o) for o in nb["cells"] if o["cell_type"] == "code")
    return "pip install" in code or not re.search(r"^\s*(?:from|import) sota_course\b", code, re.M)


def with_badges(nb: dict, name: str, at: Address) -> dict:
    "`nb` with its badges for the address `at`, in a cell of their own under the title."
    cells = [o for o in nb["cells"] if not BADGES.fullmatch(source(o))]
    if runs_alone(nb):
        lines = badges(name, at).splitlines(keepends=True)
        # An id made from the path: the same notebook gets the same bytes each time.
        key = sha1(name.encode()).hexdigest()[:8]
        cells.insert(1, dict(cell_type="markdown", id=key, metadata={}, source=lines))
    return {**nb, "cells": cells}


def dumps(nb: dict) -> str:
    "`nb` as nbdev writes it."
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


# --- every file ---


def tracked(root: Path) -> list[Path]:
    """The text files that git knows or would add, except those that nbdev writes and the one that
    says the address."""
    kept = []
    for path in files(root):
        name = path.relative_to(root).as_posix()
        made = name == "pyproject.toml" or name.startswith("sota_course/")
        if not made and not path.is_symlink() and b"\0" not in path.read_bytes():
            kept.append(path)
    return kept


def former(root: Path) -> set[Address]:
    "The addresses that badges were written for."
    found = set()
    for path in (root / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            m = BADGES.fullmatch(source(cell))
            if m:
                page = page_name(unquote(m["nb"])) + ".html"
                found.add(Address(m["repo"], m["page"].removesuffix(page)))
    return found


def move(text: str, old: Address, new: Address) -> str:
    "`text` with every link below the address `old` moved to `new`."
    hosts = r"((?:github\.com|githubusercontent\.com|google\.com/github|mybinder\.org/v2/gh)/)"
    text = re.sub(hosts + re.escape(old.repo) + r"(?![\w-])", lambda m: m[1] + new.repo, text)
    site = re.escape(old.docs.rstrip("/")) + r"(?![\w-])"
    return re.sub(site, lambda m: new.docs.rstrip("/"), text)


def stale(root: Path = ROOT) -> dict[Path, str]:
    "The files that don't agree with pyproject, and what they should say."
    new, res = address(root), {}
    olds = former(root) - {new}
    for path in tracked(root):
        text = fixed = path.read_text(encoding="utf-8")
        for old in olds:
            fixed = move(fixed, old, new)
        if path.suffix == ".ipynb" and root / "nbs" in path.parents:
            nb = json.loads(fixed)
            badged = with_badges(nb, path.relative_to(root / "nbs").as_posix(), new)
            if badged != nb:
                fixed = dumps(badged)
        if fixed != text:
            res[path] = fixed
    return res


URL = re.compile(r"https?://[^\s<>()\[\]{}\"'`\\|]+")
NOWHERE = re.compile(r"https?://(?:localhost|127\.|example\.|[^/]*\.(?:invalid|test)\b)")


def urls(root: Path = ROOT) -> list[str]:
    "Links to other places in notebooks and documents, sorted."
    found = set()
    for path in tracked(root):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            cells = map(source, json.loads(text)["cells"])
            text = "\n".join(o for o in cells if not BADGES.fullmatch(o))
        elif path.suffix not in (".md", ".cff", ".toml", ".ini"):
            continue
        found |= {o.rstrip(".,;:") for o in URL.findall(text)}
    return sorted(o for o in found if not NOWHERE.match(o))


def made_file(doc: str, path: Path, make, problem: str):
    "The command of a script that makes the file `path`: write it, or only look, with --check."
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    wish = f"change nothing; fail where {path.relative_to(ROOT).as_posix()} would change"
    parser.add_argument("--check", action="store_true", help=wish)
    args, made = parser.parse_args(), make()
    if not args.check:
        path.write_text(made, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != made:
        sys.exit(problem)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="change nothing; fail where something would change")
    add("--urls", action="store_true", help="list the outside links")
    args = parser.parse_args()
    if args.urls:
        return print("\n".join(urls()))
    moved, changed = former(ROOT) - {address()}, stale()
    names = "\n".join(f"  {o.relative_to(ROOT).as_posix()}" for o in changed)
    if args.check and changed:
        sys.exit(
            "links that pyproject.toml's [project.urls] doesn't give; "
            f"run `python scripts/links.py`:\n{names}"
        )
    if not changed:
        return
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    print(names)
    # nbdev writes the address into the modules, from pyproject too.
    if moved:
        code = "from nbdev.doclinks import nbdev_export as f; f()"
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=env)


if __name__ == "__main__":
    main()
