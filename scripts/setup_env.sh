# Sourced by the other scripts: makes .venv from requirements.lock and puts it first on PATH.
# usage: . scripts/setup_env.sh [extras]      extras: "" or "[dev]"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
stamp=".venv/installed$extras"
if [ ! -e "$stamp" ] || [ requirements.lock -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  python=""
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "cm_train needs Python 3.11, 3.12 or 3.13; found: $(python3 --version 2>&1 || echo none)" >&2
    exit 2
  fi
  echo "installing into .venv (torch is large: a few minutes)" >&2
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c requirements.lock -e ".$extras"
  touch "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
