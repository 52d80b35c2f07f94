"""docs/architecture.md walks a message through the code by names; the names exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`(mailgrpc(?:\.\w+)+):(\w+(?:\.\w+)*)`", PAGE)))
FILES = sorted(set(re.findall(r"`((?:mailgrpc|proto)/[\w/.]+)`", PAGE)))
SQL = (ROOT / "mailgrpc/db/migrations/versions/0001_functions.sql").read_text()


def test_the_page_names_the_whole_way() -> None:
    assert len(NAMED) >= 25


@pytest.mark.parametrize(("module", "path"), NAMED)
def test_what_the_page_names_exists(module: str, path: str) -> None:
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)


@pytest.mark.parametrize("path", FILES)
def test_the_files_it_names_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("function", re.findall(r"SQL function\s+`(\w+)`", PAGE))
def test_the_sql_functions_it_names_exist(function: str) -> None:
    assert f"FUNCTION {function}(" in SQL
