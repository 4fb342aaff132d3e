#!/bin/sh
# Makes .venv with everything that the tests and the quickstart need. Run again, it does nothing.
#
#   tools/bootstrap.sh [PYTHON]          use this interpreter (the variable PYTHON says it too)
#   tools/bootstrap.sh --find [PYTHON]   only print the interpreter that would be used
#
# Without a choice it takes the older of 3.12 and 3.13: that one has the most prebuilt wheels. 3.14
# is refused: megatron-core 0.19 has no wheel for it, and its argument parser uses what argparse
# dropped there. Exit codes: 0 done, 1 the installation failed, 2 no usable Python.
set -eu
started_in=$PWD
cd "$(dirname "$0")/.."
here=$(pwd -P)
venv=.venv
stamp=$venv/stamp
log=$venv/bootstrap.log
extras=megatron,hf,gguf,plot,dev
# measured on Linux x86-64 with torch 2.13.0: .venv, and the most that was taken while pip worked
environment_mb=5300
peak_mb=6900

say() { printf 'bootstrap: %s\n' "$*"; }
fail() {
    code=$1
    shift
    printf 'bootstrap: %s\n' "$@" >&2
    exit "$code"
}

# prints MINOR, VERSION, VERDICT, PATH and REAL PATH of an interpreter, separated by tabs; nothing
# where it does not run. The program is legal Python 2 too, so that an old one can say its version
probe() {
    "$1" -ES -c '
import os, sys
verdict = "ok"
if sys.version_info < (3, 12):
    verdict = "too old"
elif sys.version_info >= (3, 14):
    verdict = "too new"
elif sys.implementation.name != "cpython":
    verdict = "not CPython"
elif not getattr(sys, "_is_gil_enabled", lambda: True)():
    verdict = "free-threaded"
else:
    try:
        import ensurepip, venv
    except ImportError:
        verdict = "no venv module"
number = "%d.%d.%d" % sys.version_info[:3]
path = sys.executable
print("\t".join([str(sys.version_info[1]), number, verdict, path, os.path.realpath(path)]))
' 2>/dev/null </dev/null
}

field() { cut -f "$1"; }

# every file that may be an interpreter: in PATH, under pyenv, known to uv
candidates() (
    IFS=:
    for directory in $PATH; do
        # an activated .venv would be deleted under its own feet when it is made anew
        [ "$directory" != "$here/$venv/bin" ] || continue
        for file in "$directory"/python "$directory"/python3 \
            "$directory"/python3.[0-9] "$directory"/python3.[0-9][0-9]; do
            [ ! -x "$file" ] || printf '%s\n' "$file"
        done
    done
    for file in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python3; do
        [ ! -x "$file" ] || printf '%s\n' "$file"
    done
    if command -v uv >/dev/null; then
        uv python find --system '>=3.12,<3.14' 2>/dev/null || true
    fi
)

survey() {
    candidates | while IFS= read -r file; do
        probe "$file" || true
    done | awk -F '\t' '!seen[$5]++'
}

remedy() {
    cat <<'END'
One of these helps; then run the same command again:
  Debian 13, Ubuntu 24.04   apt install python3 python3-venv
  macOS                     brew install python@3.13
  uv (any Linux or macOS)   uv python install 3.12
  pyenv (likewise)          pyenv install 3.12
Debian 12's own Python is 3.11: take uv or pyenv there.
A Python that is not in PATH: make PYTHON=/path/to/python3.12, or tools/bootstrap.sh /path/to/python3.12
END
}

# prints the path of a usable interpreter
find_python() {
    if [ -n "$wanted" ]; then
        file=$(command -v "$wanted") || fail 2 "PYTHON=$wanted: there is no such program"
        row=$(probe "$file") || fail 2 "PYTHON=$wanted does not run as a Python"
        rows=$row
    else
        rows=$(survey)
    fi
    best=$(printf '%s\n' "$rows" | awk -F '\t' '
        $3 == "ok" && (best == "" || $1 < least) { least = $1; best = $4 }
        END { print best }')
    if [ -z "$best" ]; then
        explain "$rows" >&2
        exit 2
    fi
    printf '%s\n' "$best"
}

explain() {
    if [ -n "$wanted" ]; then
        echo "bootstrap: PYTHON=$wanted cannot be used; needed: CPython 3.12 or 3.13 with venv"
    else
        echo "bootstrap: no CPython 3.12 or 3.13 with venv in PATH, pyenv or uv; found:"
    fi
    printf '%s\n' "${1:-	none}" | sort -t "$(printf '\t')" -k 1,1n | awk -F '\t' '{
        line = sprintf("  %-8s %-15s %s", $2, $3, $4)
        sub(/ +$/, "", line)
        print line
        if ($3 == "no venv module") {
            split($2, part, ".")
            printf "           on Debian and Ubuntu: apt install python%s.%s-venv\n", part[1], part[2]
        }
    }'
    remedy
}

# what the environment was made from: this Python, the extras and the two files
fingerprint() {
    "$venv/bin/python" -IS -c '
import hashlib, pathlib, sys
digest = hashlib.sha256(f"{sys.version} {sys.argv[1]}".encode())
for name in sys.argv[2:]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
' "$extras" pyproject.toml constraints.txt 2>/dev/null
}

# the first reason why .venv cannot be kept; nothing when it can
flaw() {
    row=$(probe "$venv/bin/python") || row=
    if [ -z "$row" ]; then
        echo "its Python does not run"
    elif [ "$(echo "$row" | field 3)" != ok ]; then
        echo "its Python $(echo "$row" | field 2) is unfit ($(echo "$row" | field 3))"
    elif [ -n "$wanted" ] && [ "$(echo "$row" | field 2,5)" != "$(probe "$python" | field 2,5)" ]; then
        echo "it holds Python $(echo "$row" | field 2), not $python"
    elif [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" != "$here" ]; then
        echo "it was made in another folder"
    elif [ ! -x "$venv/bin/pip" ]; then
        echo "it has no pip"
    fi
}

write_stamp() {
    printf '%s\n%s\n' "$here" "$1" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

make_venv() {
    [ -n "$python" ] || python=$(find_python)
    say "making .venv with $python ($(probe "$python" | field 2))"
    mkdir "$venv"
    write_stamp unfinished
    "$python" -m venv "$venv" >"$log" 2>&1 || {
        tail -n 5 "$log" >&2
        fail 1 "$python -m venv .venv failed"
    }
}

warn_about_disk() {
    [ "$(uname)" = Linux ] || return 0
    [ ! -e "$(echo "$venv"/lib/python3*/site-packages/torch)" ] || return 0
    free=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$peak_mb" ] || say "warning: $free MB are free here; with torch's CUDA build" \
        "the environment takes about $environment_mb MB, and $peak_mb MB while it is installed"
}

# keeps pip's words in the log; on a terminal its last line shows that it is alive
follow() {
    while IFS= read -r line; do
        printf '%s\n' "$line" >&3
        [ ! -t 1 ] || printf '\r\033[K  %.76s' "$line"
    done 3>"$log"
    [ ! -t 1 ] || printf '\r\033[K'
}

install_packages() {
    warn_about_disk
    # pip writes RECORD last; without it a package was cut off, and pip would take it for whole
    for metadata in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [ -e "$metadata/RECORD" ] || rm -rf "$metadata"
    done
    say "installing the packages of constraints.txt (a fresh start takes minutes; log: $log)"
    { "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        -c constraints.txt -e ".[$extras]" && write_stamp "$(fingerprint)"; } 2>&1 | follow
    [ "$(sed -n 2p "$stamp")" != unfinished ] || fail 1 "$(diagnosis)" "the log is $log"
}

diagnosis() {
    if grep -q 'No space left on device' "$log"; then
        echo "the disk is full: .venv, pip's cache or the temporary folder (TMPDIR) has no room left"
    elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|ReadTimeout|SSLError|Network is unreachable' "$log"; then
        echo "pip could not reach its package index; what was downloaded is kept, so run it again" \
            "when the network is back (a mirror or a proxy: pip's own settings apply)"
    else
        sed -n 's/^ *ERROR/ERROR/p' "$log" | head -n 2 | grep . || echo "pip failed: $(tail -n 1 "$log")"
    fi
}

find_only=
if [ "${1:-}" = --find ]; then
    find_only=yes
    shift
fi
case ${1:-} in -*) fail 2 "unknown option $1 (usage: tools/bootstrap.sh [--find] [PYTHON])" ;; esac
wanted=${1:-${PYTHON:-}}
case $wanted in
    /*) ;;
    */*) wanted=$started_in/$wanted ;;
esac
python=
if [ -n "$wanted" ] || [ -n "$find_only" ]; then python=$(find_python); fi
if [ -n "$find_only" ]; then
    printf '%s\n' "$python"
    exit
fi

if [ ! -e "$venv" ]; then
    make_venv
elif [ -f "$stamp" ]; then
    why=$(flaw)
    if [ -n "$why" ]; then
        say "making .venv anew: $why"
        [ -n "$python" ] || python=$(find_python)
        # renamed first: an interrupted deletion must not leave half an environment by that name
        rm -rf "$venv.old"
        mv "$venv" "$venv.old"
        rm -rf "$venv.old"
        make_venv
    elif [ "$(sed -n 2p "$stamp")" = "$(fingerprint)" ]; then
        exit 0
    fi
else
    why=$(flaw)
    [ -z "$why" ] || fail 2 ".venv is not from this script and cannot be used: $why" \
        "move or delete that folder, then run it again"
fi
write_stamp unfinished
install_packages
say "ready: $("$venv/bin/python" -V) in .venv"
