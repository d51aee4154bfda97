#!/usr/bin/env bash
# Sets everything up, then runs lint, types and tests, one a core: what every change has to pass, in some minutes.
#   --unit       without the tests that start whole commands
#   --all        the proofs that take long too: two hours
#   --lowest     those of --unit with the lowest versions of all dependencies that pyproject.toml allows, in an
#                environment of its own
#   --coverage   those of no option, and which share of each room's lines they run, held to a floor
# What follows goes to pytest: scripts/test.sh --unit -k heun
chosen="not long and not gpu" tier="" covers="" report=""
case "${1:-}" in
  --all) chosen="not gpu" report="-rs"; shift ;; # what is skipped, and for want of which tool
  --unit) chosen="not long and not command and not gpu"; shift ;;
  --lowest) chosen="not long and not command and not gpu" tier=lowest; shift ;;
  --coverage) covers=1; shift ;;
esac
. "$(dirname "$0")/setup_env.sh" "[dev]" "$tier"

if [ -n "$covers" ]; then
  [ $# -eq 0 ] || { echo "--coverage is of all tests; got $*" >&2; exit 2; }
  coverage erase
  coverage run -m pytest -n auto -m "not command and $chosen"
  coverage combine --quiet
  coverage json --quiet --ignore-errors -o .coverage-calls.json
  coverage run -m pytest -n auto -m "command and $chosen"
  coverage combine --quiet --append
  coverage json --quiet --ignore-errors -o .coverage-all.json
  exec python scripts/coverage_floors.py .coverage-calls.json .coverage-all.json
fi
if [ -z "$tier" ]; then
  ruff check .
  ruff format --check .
  mypy
fi
pytest -n auto $report -m "$chosen" "$@"
