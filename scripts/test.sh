#!/usr/bin/env bash
# Sets everything up, then runs lint, types and tests, one a core. --all adds the proofs that take long; --unit leaves
# out the tests that start whole commands, which are most of the time; --lowest runs those of --unit with the lowest
# versions of all dependencies that pyproject.toml allows, in an environment of its own.
chosen="not long and not gpu" tier=""
case "${1:-}" in
  --all) chosen="not gpu"; shift ;;
  --unit) chosen="not long and not command and not gpu"; shift ;;
  --lowest) chosen="not long and not command and not gpu" tier=lowest; shift ;;
esac
. "$(dirname "$0")/setup_env.sh" "[dev]" "$tier"

if [ -z "$tier" ]; then
  ruff check .
  ruff format --check .
  mypy
fi
pytest -n auto -m "$chosen" "$@"
