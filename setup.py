"`settings.ini`, and the package's version, become the metadata that pyproject.toml calls dynamic."

from configparser import ConfigParser
from pathlib import Path
import re

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read_string((here / "settings.ini").read_text(encoding="utf-8"))
cfg = config["DEFAULT"]


def lines(key):
    return [o for o in (line.strip() for line in cfg[key].splitlines()) if o]


def find(file, pattern):
    return re.search(pattern, (here / file).read_text(encoding="utf-8"), re.M)[1]


name = find("pyproject.toml", r'^name = "(.+)"')
first_python = int(find("pyproject.toml", r'^requires-python = ">=3\.(\d+)"'))

setup(
    version=find(f"{name}/__init__.py", r'^__version__ = "(.+)"'),
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Framework :: Jupyter",
    ]
    + [
        f"Programming Language :: Python :: 3.{o}"
        for o in range(first_python, int(cfg["last_python_minor"]) + 1)
    ],
    install_requires=lines("requirements"),
    extras_require={
        k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")
    },
    # The measured runs travel with the package: a chapter that is opened alone shows them too.
    packages=[*find_packages(include=[name, f"{name}.*"]), f"{name}.results"],
    package_dir={f"{name}.results": "results"},
    package_data={f"{name}.results": ["*.json", "*/*.json"]},
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{name}={name}._modidx:d"],
    },
)
