"""What gpu_fetch.py puts beside its figures: peers and prefill, in processes of their own, and the cost of a fetch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmarket.transport.cuda_runtime import load_cuda

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

LIMIT_S = 120


def cost(fetch: Callable[[], None]) -> dict[str, float]:
    """Count what one fetch costs: kernels launched, lists sent to the card beside them, calls of Python functions."""
    work, calls = load_cuda().work, 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    before = work.launches, work.uploads
    fetch()
    after = work.launches, work.uploads
    sys.setprofile(count)
    try:
        fetch()
    finally:
        sys.setprofile(None)
    return {"launches": after[0] - before[0], "uploads": after[1] - before[1], "python_calls": calls}


def beside(options: argparse.Namespace) -> dict[str, Any]:
    """Run what else was asked for, each in processes of its own."""
    here = Path(__file__).parent
    found: dict[str, Any] = {}
    if options.peers:
        for peer in ("nixl", "ucxx"):
            cards = ["--card", str(options.card), "--source-card", str(options.source_card)]
            found[peer] = _last_line([sys.executable, str(here / "gpu_peers.py"), peer, *cards])
    if options.prefill:
        found["prefill"] = _last_line([sys.executable, str(here / "gpu_prefill.py"), "--card", str(options.card)])
    return found


def _last_line(command: list[str]) -> Any:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {LIMIT_S} s"}
    if done.returncode:
        return {"failed": (done.stderr or done.stdout)[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])
