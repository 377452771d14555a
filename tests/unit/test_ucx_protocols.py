"""Reading the tables that UCX prints of its protocols."""

from math import inf

from kvmarket.testing.ucx_protocols import Protocol, of_gpu_messages, protocols

PRINTED = """
[17955.2] [vm:506]   | ucp_context_0 intra-node cfg#2 | remote memory write by ucp_put* from host memory to cuda |
[17955.2] [vm:506]   |                         0..inf | software emulation                      | sysv/memory   |
[17955.2] [vm:506]   +--------------------------------+-----------------------------------------+---------------+
[17955.2] [vm:506]  | ucp_context_0 intra-node | active message by ucp_am_send* with reply flag(rndv) from cuda/GPU0 |
[17955.2] [vm:506]   +--------------------------------+-----------------------------------------+---------------+
[17955.2] [vm:506]   |                              0 | (?) rendezvous no data fetch            |               |
[17955.2] [vm:506]   |                         1..8191| (?) rendezvous fragmented copy-in copy-out | tcp/lo     |
[17955.2] [vm:506]   |                         8K..inf| (?) rendezvous zero-copy read from remote | cuda_ipc/cuda |
{"path": "am(tcp/lo)", "bytes": 536870912}
"""


def test_rows_are_found_with_their_operation():
    emulated, empty, short, direct = protocols(PRINTED)
    put = "remote memory write by ucp_put* from host memory to cuda"
    assert emulated == Protocol(put, 0, inf, "software emulation", "sysv/memory")
    assert (empty.first, empty.last, empty.lanes) == (0, 0, "")
    assert (short.first, short.last, short.lanes) == (1, 8191, "tcp/lo")
    assert (direct.first, direct.last, direct.lanes) == (8192, inf, "cuda_ipc/cuda")
    assert direct.operation.endswith("from cuda/GPU0")


def test_of_messages_from_a_card_by_size():
    assert [found.lanes for found in of_gpu_messages(PRINTED, 4 << 20)] == ["cuda_ipc/cuda"]
    assert [found.how for found in of_gpu_messages(PRINTED, 100)] == ["(?) rendezvous fragmented copy-in copy-out"]
