"""One read whose parts several threads take, first to last.

One thread does not use all the memory bandwidth of a machine, and where pages are verified it uses even less.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kvmarket.errors import TransportError
from kvmarket.report import MissReason, TransferReport
from kvmarket.transport import ReadRequest

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np

    from kvmarket.deadline import Deadline
    from kvmarket.helper import Helper
    from kvmarket.transport import Connection
    from kvmarket.verification import Verification

PART_BYTES_MIN, PART_BYTES_MAX = 512 << 10, 4 << 20
"""Parts get smaller towards the end, so that the threads finish at about the same time."""
SHARED_BYTES_MIN = 2 << 20
"""Smaller reads are over before a second thread is awake."""


class SharedRead:
    """Reads and verifies the pages of one request, over a connection that does not digest them itself.

    Attributes:
        threads: how many threads have taken part.
    """

    def __init__(
        self, connection: Connection, request: ReadRequest, deadline: Deadline, verification: Verification
    ) -> None:
        self._connection, self._request, self._deadline = connection, request, deadline
        self._verification = verification
        self._page_bytes = request.local.layout.page_bytes
        self._total = len(request.pages)
        self._lock = threading.Lock()
        self._next = 0
        self._refused: dict[int, MissReason] = {}
        self._reports: list[TransferReport] = []
        self._error: TransportError | None = None
        self.threads = 0

    def run(self, helper: Helper) -> TransferReport:
        """Read everything, with the help of `helper` if the connection gains by it; return one report of it all.

        The helper is waited for only once it has begun: one that is busy elsewhere delays nothing. When this returns
        or raises, nothing writes to the local pages any more.

        Raises:
            PeerGoneError, TransferError: the connection is of no more use.
        """
        began = time.perf_counter()
        help_: Future[None] | None = None
        large = self._total * self._page_bytes >= SHARED_BYTES_MIN
        if large and helper.useful and self._connection.readers(self._request.local) > 1:
            help_ = helper.submit(self._work)
        try:
            self._work(alone=help_ is None)
        finally:
            if help_ is not None and not help_.cancel():
                help_.result()
        if self._error is not None:
            raise self._error
        return self._report(time.perf_counter() - began)

    def _work(self, *, alone: bool = False) -> None:
        with self._lock:
            self.threads += 1
        while (part := self._take(alone=alone)) is not None:
            try:
                self._read(part)
            except TransportError as error:
                self._error = error

    def _take(self, *, alone: bool) -> slice | None:
        """Claim the next part, or None when there is none or it has become pointless."""
        with self._lock:
            left = self._total - self._next
            if not left or self._refused or self._error or self._verification.mismatched:
                return None
            wanted = left * self._page_bytes // 4
            nbytes = left * self._page_bytes if alone else max(PART_BYTES_MIN, min(wanted, PART_BYTES_MAX))
            start = self._next
            self._next += min(left, max(1, nbytes // self._page_bytes))
            return slice(start, self._next)

    def _read(self, part: slice) -> None:
        request = self._request

        def on_group(indices: np.ndarray) -> None:
            self._verification.check(indices + part.start)

        pages, generations, targets = request.pages[part], request.generations[part], request.local_pages[part]
        wanted = ReadRequest(pages, generations, request.local, targets)
        report = self._connection.read(wanted, deadline=self._deadline, on_group=on_group)
        with self._lock:
            self._reports.append(report)
            self._refused.update({index + part.start: reason for index, reason in report.refused.items()})

    def _report(self, seconds: float) -> TransferReport:
        refused = self._refused
        refused.update(dict.fromkeys(self._verification.mismatched, MissReason.DIGEST_MISMATCH))
        # What nobody took because of that comes after it, and was neither read nor refused.
        return TransferReport(
            self._connection.scheme,
            self._connection.path,
            sum(report.pages for report in self._reports),
            sum(report.nbytes for report in self._reports),
            seconds,
            sum(report.copy_seconds for report in self._reports),
            refused,
            self._connection.tier,
        )
