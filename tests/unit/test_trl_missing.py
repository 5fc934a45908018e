"""Where TRL is not installed, its bridge says so, and nothing else of the client misses it."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_the_bridge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vopd_client.trl", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)  # an import of it fails
    with pytest.raises(ImportError, match=r"vopd_client\.trl needs TRL: pip install 'trl>=1\.16'"):
        importlib.import_module("vopd_client.trl")
