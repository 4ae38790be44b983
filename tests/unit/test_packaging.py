"""What `pip install .` takes along."""

import re
from pathlib import Path

from ssr_core.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_package_of_the_engine_is_listed():
    listed = re.search(r"^packages = \[(.*)\]$", PYPROJECT, re.M)
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "ssr_core").rglob("__init__.py")}
    assert listed is not None and set(re.findall(r'"([^"]+)"', listed[1])) == folders


def test_the_version_is_one():
    assert f'\nversion = "{VERSION}"\n' in PYPROJECT
