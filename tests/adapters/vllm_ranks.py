"""What the tests of engines with several workers do inside those processes, by `Replica.call`. Tests only."""

from __future__ import annotations

import multiprocessing
import os
from functools import partial

from vllm_faults import corrupt_market

from kvmarket.deadline import Deadline


def start_quickly():
    """Have vLLM fork workers, where it would spawn them, and compile nothing: seconds instead of a minute."""
    import torch
    from vllm.v1.executor import multiproc_executor

    torch._dynamo.config.disable = True  # embeddings that are split over ranks are compiled, even in eager mode

    multiproc_executor.get_mp_context = partial(multiprocessing.get_context, "fork")


def in_ranks(engine, name, **arguments):
    """Call a function of this module in every worker, with its market before `arguments`; return what they return."""
    return engine.collective_rpc(_in_rank, timeout=20.0, args=(name, arguments))


def _in_rank(worker, name, arguments):
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return globals()[name](get_kv_transfer_group().market, worker.rank, **arguments)


def flush(market, rank):
    """Wait until the registry has taken all that this rank offers."""
    market.publisher.flush(Deadline(10.0))
    return len(market.publisher._page_of)


def pid(market, rank):
    return os.getpid()


def namespace(market, rank):
    return market.core.namespace.digest.hex()


def counters(market, rank):
    return market.core.metrics.snapshot()


def corrupt(market, rank, *, ranks, index):
    """Change the KV of block `index` of the prompt offered last in what `ranks` offer; see `vllm_faults.corrupt`."""
    if rank in ranks:
        corrupt_market(market, index)
