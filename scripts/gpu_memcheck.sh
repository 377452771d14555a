#!/bin/sh
# Run tests of the kernels under compute-sanitizer's memcheck on a GPU host, child processes included; its summary comes
# last, and what it finds is a failure. Errors that calls return are left to the tests: a dead peer's memory must give one.
#     scripts/gpu_memcheck.sh [pytest arguments; default: the kernels' tests and the suite of the transport]
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD:$PWD/adapters${PYTHONPATH:+:$PYTHONPATH}"
[ $# -gt 0 ] || set -- tests/gpu/test_kernels.py tests/gpu/test_conformance.py
exec compute-sanitizer --tool memcheck --target-processes all --report-api-errors no --error-exitcode 86 \
    "${PYTHON:-python3}" -m pytest --require-gpu --timeout=300 "$@"
