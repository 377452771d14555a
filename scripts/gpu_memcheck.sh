#!/bin/sh
# Run the kernels' tests under compute-sanitizer's memcheck on a GPU host, child processes included; its summary comes last,
# and what it finds is a failure. Errors that calls return are not counted: the tests look at those themselves.
#     scripts/gpu_memcheck.sh [pytest arguments; default: tests/gpu/test_kernels.py]
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD:$PWD/adapters${PYTHONPATH:+:$PYTHONPATH}"
[ $# -gt 0 ] || set -- tests/gpu/test_kernels.py
exec compute-sanitizer --tool memcheck --target-processes all --report-api-errors no --error-exitcode 86 \
    "${PYTHON:-python3}" -m pytest --require-gpu --timeout=300 "$@"
