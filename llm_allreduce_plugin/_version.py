"""The installed version, as the package metadata has it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("llm_allreduce_plugin")
except PackageNotFoundError:  # a source tree on sys.path, never installed
    __version__ = "0+unknown"
