"""Lines of the log: fields that nobody can forge, and no kind more often than it should."""

import json
import logging
import subprocess
import sys
import threading

import pytest

from kvmarket import logs
from kvmarket.logs import PER_MINUTE, WINDOW_S, Limiter, Log, line, set_format


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def events(clock, caplog):
    caplog.set_level(logging.DEBUG, "kvmarket.test")
    return Log("kvmarket.test", Limiter(clock))


@pytest.fixture
def as_json():
    set_format("json")
    yield
    set_format("text")


def test_a_line_has_a_sentence_and_fields(events, caplog):
    events.warning("server_away", "the server is away", url="redis://host:1", pause_s=0.5, why="no answer")
    assert caplog.messages == ['kvmarket: the server is away url=redis://host:1 pause_s=0.5 why="no answer"']
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "kvmarket.test")
    assert record.filename == "test_logs.py", "it is said to come from where it was written"


def test_one_kind_is_written_so_many_times_a_minute(events, caplog, clock):
    for number in range(100):
        events.warning("torn", "a read was torn", number=number)
    assert len(caplog.messages) == PER_MINUTE
    events.warning("other", "another kind is not concerned")
    assert len(caplog.messages) == PER_MINUTE + 1
    clock.now = WINDOW_S - 0.001
    events.warning("torn", "a read was torn")
    assert len(caplog.messages) == PER_MINUTE + 1
    clock.now = WINDOW_S
    events.warning("torn", "a read was torn")
    assert caplog.messages[-1] == f"kvmarket: a read was torn left_out={100 - PER_MINUTE + 1}"
    events.warning("torn", "a read was torn")
    assert caplog.messages[-1] == "kvmarket: a read was torn", "those were told"


def test_kinds_are_bounded(clock):
    limiter = Limiter(clock)
    admitted = [limiter.admits(f"kind {number}") for number in range(10 * logs.KINDS_MAX)]
    assert sum(each is not None for each in admitted) == logs.KINDS_MAX + PER_MINUTE
    assert len(limiter._kinds) == logs.KINDS_MAX + 1


def test_threads_together_do_not_write_more(clock):
    limiter = Limiter(clock)
    admitted = []

    def write():
        admitted.extend(limiter.admits("kind") for _ in range(500))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each is not None for each in admitted) == PER_MINUTE
    clock.now = WINDOW_S
    assert limiter.admits("kind") == 2000 - PER_MINUTE


def test_what_is_not_written_does_not_count(events, caplog):
    caplog.set_level(logging.WARNING, "kvmarket.test")
    for _ in range(100):
        events.debug("kind", "nobody looks")
    caplog.set_level(logging.DEBUG, "kvmarket.test")
    events.debug("kind", "somebody looks")
    events.info("kind", "and sees this")
    events.error("kind", "and this")
    assert [record.levelname for record in caplog.records] == ["DEBUG", "INFO", "ERROR"]
    assert "left_out" not in caplog.text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "x"', '"say \\"x\\""'),
        ("one\ntwo", '"one\\ntwo"'),
        ("\x1b[31mred", '"\\u001b[31mred"'),
        ("\u2028", '"\\u2028"'),
        ("größe", "größe"),
        (12, "12"),
        (None, "None"),
        (ValueError("no room"), '"no room"'),
        ("x" * 1000, "x" * 300 + "..."),
    ],
)
def test_values_cannot_break_a_line(value, shown):
    assert line("kind", "text", {"field": value}) == f"kvmarket: text field={shown}"


def test_json_is_one_object_a_line(events, caplog, as_json):
    events.warning("server_away", "the server is away", why='no\n"answer"', tries=3, error=ValueError("x"))
    assert "\n" not in caplog.messages[0]
    expected = {"event": "kvmarket.server_away", "message": "the server is away", "why": 'no\n"answer"'}
    assert json.loads(caplog.messages[0]) == {**expected, "tries": 3, "error": "x"}


def test_where_an_error_came_from_is_short():
    try:
        json.loads("{")
    except ValueError as error:
        found = logs.where(error)
    assert found.startswith("decoder.py:")
    assert "test_logs.py:" in found


def test_it_costs_nothing_to_import():
    code = (
        "import sys, logging, json, threading, time, traceback, pathlib, typing, __future__; before = set(sys.modules);"
    )
    code += "import kvmarket.logs; print(sorted(m for m in set(sys.modules) - before if not m.startswith('kvmarket')))"
    slim = "import importlib.util, types, sys; sys.modules['kvmarket'] = types.ModuleType('kvmarket');"
    slim += f"sys.modules['kvmarket'].__path__ = [{str(logs.__file__.rpartition('/')[0])!r}];"
    done = subprocess.run([sys.executable, "-c", slim + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
