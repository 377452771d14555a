"""The tables of docs/OPERATIONS.md say what the code does."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import kvmarket
from kvmarket.config import MarketConfig
from kvmarket.logs import PER_MINUTE
from kvmarket.metric_families import FAMILIES, shown_name
from kvmarket.metrics import LABEL_VALUES_MAX
from kvmarket.report import MissReason

ROOT = Path(kvmarket.__file__).parent.parent
DOC = ROOT / "docs" / "OPERATIONS.md"

pytestmark = pytest.mark.skipif(not DOC.exists(), reason="the documentation is not part of an installation")


def table(section):
    """Return the rows of the first table of a section: lists of cells, without marks of code."""
    text = DOC.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    assert set("".join(rows[1])) == {"-"}
    return rows[2:]


def test_every_setting_is_there_with_its_default():
    defaults = {item.metadata["env"]: item.default for item in fields(MarketConfig)}
    shown = {name: "empty" if not value else str(value) for name, value in defaults.items()}
    assert {row[0]: row[1] for row in table("Settings")} == shown
    assert all(len(row) == 4 and row[2] for row in table("Settings"))


def test_every_metric_is_there():
    expected = [[shown_name(name), family.label, family.kind, family.text] for name, family in FAMILIES.items()]
    assert table("Metrics") == expected
    assert f"at most {LABEL_VALUES_MAX} values" in DOC.read_text()


def test_metrics_that_the_text_mentions_exist():
    known = {shown_name(name) for name in FAMILIES}
    mentioned = set(re.findall(r"(?<![:\w])kvmarket_\w+", DOC.read_text())) - {"kvmarket_vllm"}
    assert mentioned - known == set()


def test_every_reason_for_a_miss_is_there():
    rows = table("What a miss means")
    assert [row[0] for row in rows] == [str(reason) for reason in MissReason]
    assert all(what and change for _, what, change in rows)


def written_in(path):
    for call in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and ast.unparse(call.func.value) == "events"
        ):
            yield [call.args[0].value, call.func.attr, call.args[1].value]


def test_every_kind_of_line_is_there():
    sources = [path for folder in ("kvmarket", "adapters") for path in (ROOT / folder).rglob("*.py")]
    assert table("Logs") == sorted(row for path in sources for row in written_in(path))
    assert f"at most {PER_MINUTE} times a minute" in DOC.read_text().replace("\n", " ")


def test_lines_about_peers_and_servers_go_through_the_limit():
    """Straight to `logging` goes only what happens once, or for who looks for a fault."""
    for folder in ("kvmarket/registry", "kvmarket"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name == "logs.py" or "logging.getLogger" not in path.read_text(), path
