"""Look-ups off the engine's thread: answers come once, nothing is asked twice, nobody waits forever."""

import threading
import time

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from kvmarket.errors import DeadlineExceededError, RegistryUnavailableError
from kvmarket_vllm import lookups as module
from kvmarket_vllm.lookups import Lookups

KEYS = [b"a", b"b"]


@pytest.fixture
def lookups():
    lookups = Lookups()
    yield lookups
    lookups.close()


@pytest.fixture
def hanging():
    """Work that ends when the event is set."""
    go_on = threading.Event()
    yield go_on
    go_on.set()


def asked_until_answered(lookups, *arguments):
    end = time.monotonic() + 10
    while (answer := lookups.ask(*arguments)) is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    return answer


def test_the_answer_comes_from_another_thread_and_once(lookups):
    threads = []

    def work():
        threads.append(threading.current_thread())
        return len(threads)

    assert asked_until_answered(lookups, "r", KEYS, work) == 1
    assert asked_until_answered(lookups, "r", KEYS, work) == 2
    assert threading.current_thread() not in threads


def test_asking_again_does_not_look_up_again_and_does_not_wait(lookups, hanging):
    calls = []

    def work():
        calls.append(1)
        hanging.wait(10)
        return "found"

    began = time.monotonic()
    for _ in range(100):
        assert lookups.ask("r", KEYS, work) is None
    assert time.monotonic() - began < 1
    hanging.set()
    assert asked_until_answered(lookups, "r", KEYS, work) == "found"
    assert len(calls) == 1


def test_other_keys_of_a_request_are_another_question(lookups, hanging):
    assert lookups.ask("r", KEYS, lambda: hanging.wait(10) and "old") is None
    assert lookups.ask("r", [b"a", b"c"], lambda: "new") is None
    hanging.set()
    assert asked_until_answered(lookups, "r", [b"a", b"c"], lambda: "newest") == "new"


def test_nobody_waits_for_a_look_up_that_does_not_end(lookups, hanging, monkeypatch):
    monkeypatch.setattr(module, "GIVE_UP_S", 0.05)
    assert lookups.ask("r", KEYS, lambda: hanging.wait(10)) is None
    time.sleep(0.06)
    with pytest.raises(DeadlineExceededError):
        lookups.ask("r", KEYS, lambda: "never")


def test_a_look_up_that_fails_is_told(lookups):
    def work():
        raise RegistryUnavailableError("away")

    with pytest.raises(DeadlineExceededError, match="failed"):
        asked_until_answered(lookups, "r", KEYS, work)
    assert asked_until_answered(lookups, "r", KEYS, lambda: "found") == "found"


def test_too_many_are_refused_at_once(lookups, hanging, monkeypatch):
    monkeypatch.setattr(module, "WAIT_S", 0.0)

    def ask_for_many():
        for number in range(module.WAITING_MAX + 3):
            assert lookups.ask(str(number), KEYS, lambda: hanging.wait(10)) is None

    with pytest.raises(DeadlineExceededError, match="waiting"):
        ask_for_many()
