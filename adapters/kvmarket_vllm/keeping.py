"""Copies, in an arena of the host, of blocks that the engine is about to overwrite: they stay published from there."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.arena_publish import ArenaPublisher, close_market
from kvmarket.core import MarketCore
from kvmarket.disk import DiskTier
from kvmarket.errors import InvalidInputError, KVMarketError
from kvmarket.registry.records import block_index

if TYPE_CHECKING:
    from typing import Self

    from kvmarket.publish import Publisher
    from kvmarket.region import PagedMemory
    from kvmarket_vllm.messages import StepPlan
    from kvmarket_vllm.stats import Deltas

logger = logging.getLogger("vllm.kvmarket")


class Kept:
    """The arena of one worker, under an owner of its own. Used from the worker's thread only.

    It has its own owner because a registry holds one record per owner of a block: the engine's is withdrawn when the
    block is overwritten, and the arena's stays.
    """

    def __init__(self, core: MarketCore, pages: PagedMemory, publisher: Publisher, deltas: Deltas) -> None:
        self._pages, self._engine, self._deltas = pages, publisher, deltas
        self._verifies = core.config.verify != "none"
        self.core = MarketCore(core.namespace, core.config, core.registry)
        self._disk = DiskTier(self.core) if core.config.disk_bytes else None
        try:
            self.arena = ArenaPublisher(self.core, nbytes=core.config.keep_bytes, disk=self._disk)
        except KVMarketError:
            close_market(self.core, None, self._disk)
            raise
        if self._verifies:
            publisher.remember_digests()

    @classmethod
    def open(cls, core: MarketCore, pages: PagedMemory, publisher: Publisher, deltas: Deltas) -> Self | None:
        """Return the arena that ``keep_bytes`` asks for, or None: none is asked for, or there cannot be one."""
        if not core.config.keep_bytes:
            if core.config.disk_bytes:
                logger.warning("kvmarket: disk_bytes without keep_bytes does nothing: the disk comes after kept blocks")
            return None
        if pages.kind != "host":
            logger.warning("kvmarket: keep_bytes keeps blocks of host memory only; nothing is kept")
            return None
        try:
            return cls(core, pages, publisher, deltas)
        except InvalidInputError as error:
            logger.warning("kvmarket: nothing is kept of what this replica overwrites: keep_bytes: %s", error)
            return None

    def before_forward(self, plan: StepPlan) -> None:
        """Copy what this step overwrites, or forget all. Call it while the engine's publisher still offers it."""
        if plan.forget:
            self.arena.forget()
        elif plan.keep:
            began = time.perf_counter()
            self._deltas.add(blocks_kept=self._keep(plan.keep), keep_seconds=time.perf_counter() - began)

    def _keep(self, entries: list[tuple[bytes, bytes | None, int]]) -> int:
        """Keep blocks that the engine offers as what they are said to be, and has announced the digest of."""
        numbers = np.array([block for _, _, block in entries], np.int64)
        digests, known = self._engine.digests_of(numbers)
        rows = [
            row
            for row, (key, _, block) in enumerate(entries)
            if self._engine.page_of(key) == block and (known[row] or not self._verifies)
        ]
        if not rows:
            return 0
        rows.sort(key=lambda row: block_index(entries[row][0]))  # parents before children
        return self.arena.keep(
            [entries[row][0] for row in rows],
            [entries[row][1] for row in rows],
            self._pages,
            numbers[rows].tolist(),
            epoch=self._engine.epoch,
            digests=digests[rows].tolist() if self._verifies else None,
        )

    def close(self) -> None:
        """Take everything back."""
        close_market(self.core, self.arena, self._disk)
