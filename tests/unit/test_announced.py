"""One comparison of bytes says of many pages what looking at each would."""

import numpy as np
import pytest

from kvmarket.announced import DIGEST_BYTES, NO_DIGEST, Announced
from kvmarket.region.generations import readable

PAGES = np.array([3, 0, 6, 1])
GENERATIONS = np.array([4, 2, 8, 6], np.uint64)


def announced(pages=PAGES, generations=GENERATIONS, digests=None):
    digests = digests or [bytes([page + 1]) * DIGEST_BYTES for page in range(len(pages))]
    return Announced(pages, generations, np.frombuffer(b"".join(digests), f"V{DIGEST_BYTES}"))


def table(length=7):
    values = np.arange(1, 2 * length, 2, np.uint64)  # all odd
    inside = length > PAGES
    values[PAGES[inside]] = GENERATIONS[inside]
    return values


def test_all_pages_or_a_part_of_them_are_current():
    values = table()
    assert announced().current(values)
    values[1] += 2
    assert not announced().current(values)
    assert announced().current(values, slice(0, 3))
    assert not announced().current(values, slice(2, 4))


@pytest.mark.parametrize("page", [-1, 7, 1 << 40, -(1 << 63)])
def test_pages_that_the_table_does_not_have_are_not_current(page):
    pages = PAGES.copy()
    pages[2] = page
    assert not announced(pages).current(table())
    assert not announced(pages).current(table(), slice(0, 2)), "nor is what was announced with them"


@pytest.mark.parametrize("generation", [0, 1, 7, 2**64 - 1])
def test_a_generation_that_is_never_readable_is_not_current_though_it_is_the_announced_one(generation):
    generations, values = GENERATIONS.copy(), table()
    generations[1] = values[PAGES[1]] = generation
    assert not announced(generations=generations).current(values)


def test_it_says_what_looking_at_each_page_says():
    rng = np.random.default_rng(5)
    agreed = 0
    for _ in range(2000):
        count = int(rng.integers(1, 6))
        pages, values = rng.integers(-1, 6, count), rng.integers(0, 4, 5).astype(np.uint64)
        generations = np.where(rng.random(count) < 0.9, values[pages % 5], 2).astype(np.uint64)
        expected = bool(readable(values, pages, generations).all())
        assert announced(pages, generations).current(values) == expected
        agreed += expected
    assert 50 < agreed < 1950


def test_digests_of_a_part_are_compared_with_those_of_that_part():
    known = announced()
    assert known.vouched
    assert known.every.all()
    assert known.same_digests(slice(1, 3), known.digests[1:3].copy())
    assert not known.same_digests(slice(1, 3), known.digests[:2])
    assert not known.same_digests(slice(1, 3), known.digests[1:2]), "one is missing"


def test_a_page_without_a_digest_is_vouched_for_by_nobody():
    known = announced(digests=[b"x" * DIGEST_BYTES, NO_DIGEST, b"y" * DIGEST_BYTES, b"z" * DIGEST_BYTES])
    assert not known.vouched
    assert known.every.all()
