#!/usr/bin/env bash
# Sets everything up, then runs lint, types and tests, one a core. --all adds the proofs that take long.
all=""
if [ "${1:-}" = "--all" ]; then all=1; shift; fi
. "$(dirname "$0")/setup_env.sh" "[dev]"

ruff check .
ruff format --check .
mypy
if [ -n "$all" ]; then
  pytest -n auto "$@"
else
  pytest -n auto -m "not long" "$@"
fi
