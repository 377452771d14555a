#!/bin/sh
# In the guest, with the host's files around it: make an RDMA device of software and run the tests over it.
set -eu
ip link set lo up
[ -e /sys/class/net/dummy0 ] || ip link add dummy0 type dummy  # the module may make one of itself
ip link set dummy0 mtu 4200 up
ip addr add 10.77.42.1/24 dev dummy0
rdma link add rxe0 type rxe netdev dummy0
rdma link show
ulimit -l unlimited

export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
export LD_LIBRARY_PATH="$VERBS_UCX" RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true
export UCX_TLS=rc_verbs,ud_verbs,tcp UCX_NET_DEVICES=rxe0:1,dummy0
export KVMARKET_TEST_VERBS_ADDRESS=10.77.42.1 PYTHONPATH="$VERBS_ROOT:$VERBS_ROOT/adapters"
cd "$VERBS_ROOT"
# The words of the options are the caller's, as make's PYTEST_ARGS are.
eval "exec \"$VERBS_PYTHON\" -u -m pytest -p no:cacheprovider --require-verbs tests/transport_ucx/test_verbs.py $VERBS_PYTEST_ARGS"
