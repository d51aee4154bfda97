#!/usr/bin/env bash
# What takes too long for every change: all tests, the share of each room that those of every change run, the lowest
# versions of all dependencies, and runs harmed at random moments. Goes on past what fails, and says what did at the end.
#   scripts/nightly.sh            some hours on two cores; KILLS=100 scripts/nightly.sh harms more
. "$(dirname "$0")/setup_env.sh" "[dev]"

failed=()
part() {
  echo "== $*"
  local began=$SECONDS
  "$@" || failed+=("$*")
  echo "== $(((SECONDS - began) / 60)) min: $*"
}

part scripts/test.sh --all
part scripts/test.sh --coverage
part scripts/test.sh --lowest
part python scripts/torture.py --kills "${KILLS:-25}" --rest 6
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
