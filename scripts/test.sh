#!/usr/bin/env bash
# Sets everything up, then runs lint, types and tests, one a core. --all adds the proofs that take long; --unit leaves
# out the tests that start whole commands, which are most of the time.
chosen="not long and not gpu"
case "${1:-}" in
  --all) chosen="not gpu"; shift ;;
  --unit) chosen="not long and not command and not gpu"; shift ;;
esac
. "$(dirname "$0")/setup_env.sh" "[dev]"

ruff check .
ruff format --check .
mypy
pytest -n auto -m "$chosen" "$@"
