#!/bin/sh
# Runs a command of megatron-xielu, or torchrun, python, bash or sh with their own arguments, as
# whatever user the container has: caches go where that user can write.
set -eu

# NVIDIA's images choose in it the CUDA libraries that fit this machine's driver; their own entry
# point, which this one replaces, and interactive shells read it
if [ -r /etc/shinit_v2 ]; then
    set +eu
    # shellcheck source=/dev/null
    . /etc/shinit_v2 >&2
    set -eu
fi

# the image's folder for them, if it is mounted and the user's; else the temporary folder, which
# `docker run --read-only` needs as a tmpfs
cache=/cache
if ! { [ -d "$cache" ] && [ -w "$cache" ]; }; then
    cache=${TMPDIR:-/tmp}/cache-$(id -u)
    mkdir -p "$cache" 2>/dev/null || {
        echo "error: ${TMPDIR:-/tmp} cannot be written: add --tmpfs /tmp:exec to docker run" >&2
        exit 2
    }
fi
# docker gives a user without an entry in /etc/passwd the home /, and no name to look up
if ! [ -w "${HOME:-/}" ]; then
    export HOME="$cache"
fi
export USER="${USER:-xielu}" LOGNAME="${LOGNAME:-xielu}"
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$cache}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$cache/matplotlib}"
export HF_HOME="${HF_HOME:-$cache/huggingface}"

case ${1:-} in
    torchrun)
        shift
        exec python3 -m torch.distributed.run "$@"
        ;;
    python | python3 | bash | sh) exec "$@" ;;
    *) exec megatron-xielu "$@" ;;
esac
