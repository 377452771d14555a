#!/bin/sh
# Run all GPU tests on a GPU host, where nothing may be skipped but what needs two cards and finds one; the runner's
# closing line comes last.
#     scripts/gpu_tests.sh [pytest options, e.g. --stress-s 60]
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD:$PWD/adapters${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m pytest tests/gpu --require-gpu --timeout=300 "$@"
