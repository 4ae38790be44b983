"""Makes the checkout importable without shadowing anybody, and keeps pytest out of the root package."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# Append, never insert: our nodes/ must not come before ComfyUI's nodes.py.
for folder in (ROOT, HERE / "unit"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


class _RootIsAFolder:
    """pytest would import the root's __init__.py as a test package, and with it ComfyUI."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    # A conftest's own hooks do not reach folders above it; a registered plugin's do.
    config.pluginmanager.register(_RootIsAFolder(), "ssr-merge-root-is-a-folder")
