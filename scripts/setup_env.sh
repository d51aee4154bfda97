# Sourced by the other scripts: makes .venv from requirements.lock and puts it first on PATH.
# usage: . scripts/setup_env.sh [extras] [lowest]      extras: "" or "[dev]"
# lowest: .venv-lowest instead, with the lowest versions that pyproject.toml allows, on Python 3.11.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
if [ "${2:-}" = lowest ]; then
  venv=.venv-lowest constraints=.venv-lowest/lowest.txt newest=11 pythons="3.11"
else
  venv=.venv constraints=requirements.lock newest=13 pythons="3.11, 3.12 or 3.13"
fi
stamp="$venv/installed$extras"
if [ ! -e "$stamp" ] || [ requirements.lock -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  python=""
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "cm_train needs Python $pythons here; found: $(python3 --version 2>&1 || echo none)" >&2
    exit 2
  fi
  echo "installing into $venv (torch is large: a few minutes)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  [ "$venv" = .venv ] || "$venv/bin/python" scripts/lowest_versions.py > "$constraints"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -c "$constraints" -e ".$extras"
  touch "$stamp"
fi
PATH="$PWD/$venv/bin:$PATH"
