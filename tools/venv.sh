# Sourced by the tools: $root (the checkout), $venv, and `ensure_venv`, which makes the virtual
# environment when missing and installs again when the packaging has changed since the last install.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${FXPRUNE_VENV:-$root/.venv}"
stamp="$venv/.fxprune-installed"

ensure_venv() {
    if [ ! -x "$venv/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "fxprune needs Python 3.10 or newer; set PYTHON to one" >&2
            return 1
        }
        echo "making $venv" >&2
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$root" ] ||
        [ "$root/setup.cfg" -nt "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ]; then
        echo "installing fxprune and what it needs (several minutes the first time)" >&2
        "$venv/bin/python" -m pip install --quiet --editable "$root[test]"
        printf '%s' "$root" > "$stamp"
    fi
}
