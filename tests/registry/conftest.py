"""These tests need a registry's executable and Docker Engine: `make registry-test`. Other test runs leave them out."""

from __future__ import annotations

import os

if "REGISTRY" not in os.environ:
    collect_ignore_glob = ["test_*"]
