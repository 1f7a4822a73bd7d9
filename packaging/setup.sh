#!/bin/sh
# Set this checkout up: a virtual environment with the project in it, and the Debian programs that demo and tests start.
#
#   packaging/setup.sh [VENV]
#
# Works on Debian, Ubuntu and Raspberry Pi OS, as root or as a user who may sudo without a password; where neither holds
# and something is missing, it says what to install and exits 1. PYTHON names the interpreter. It leaves no system
# service behind: Debian's mosquitto package starts a broker on port 1883, and that is prevented. A second run finds its
# own stamp (over pyproject.toml, this file and the interpreter) and does nothing.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
stamp=$venv/.setup-stamp
PATH=$PATH:/usr/sbin:/sbin # mosquitto is there, and not on every user's path

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { # MESSAGE HINT
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 1
}

find_python() { # prints the first interpreter that is new enough
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    found=$("${PYTHON:-python3}" -V 2>/dev/null) || found=missing
    fail "Python 3.11 or newer is needed, ${PYTHON:-python3} is $found" \
        "install one, or name it: make PYTHON=/path/to/python3.11"
}

missing_packages() { # PYTHON: Debian packages to install, on one line
    for program in mosquitto strace; do
        command -v "$program" >/dev/null || printf '%s ' "$program"
    done
    [ -x "$venv/bin/python" ] || "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        "$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
}

wanted_stamp() { # everything that the environment depends on
    { "$1" -VV; command -v "$1"; pwd; cat pyproject.toml packaging/setup.sh; } | sha256sum
}

apt_install() { # PACKAGE...: through apt, without starting what comes with it
    command -v apt-get >/dev/null || fail "not installed: $*" "install these by the system's own package tool: $*"
    if [ "$(id -u)" = 0 ]; then
        root=
    elif sudo -n true 2>/dev/null; then
        root='sudo -n'
    else
        fail "not installed: $* (and this user may not install packages)" "sudo apt-get install $*"
    fi
    say "installing $* with apt"
    policy=/usr/sbin/policy-rc.d # 101 forbids package scripts to start services
    placed=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | $root tee "$policy" >/dev/null
        $root chmod 755 "$policy"
        placed=yes
        trap '$root rm -f "$policy"' EXIT
    fi
    $root apt-get update -qq || say "apt-get update failed; trying with what is known"
    status=0
    told=$($root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends "$@" 2>&1) || status=$?
    [ "$status" = 0 ] || printf '%s\n' "$told" >&2
    if [ -n "$placed" ]; then
        $root rm -f "$policy"
        trap - EXIT
    fi
    [ "$status" = 0 ] || fail "apt could not install: $*" "sudo apt-get update && sudo apt-get install $*"
    case " $* " in
    *" mosquitto "*)
        if command -v systemctl >/dev/null; then # nor at the next boot
            $root systemctl disable --quiet mosquitto.service 2>/dev/null || true
            [ ! -d /run/systemd/system ] || $root systemctl stop mosquitto.service
        fi
        ;;
    esac
}

make_venv() { # PYTHON
    # Kept over a changed pyproject.toml; made anew when it is of another interpreter or does not work.
    if [ "$("$venv/bin/python" -VV 2>/dev/null)" = "$("$1" -VV)" ] && "$venv/bin/python" -m pip -V >/dev/null 2>&1; then
        return
    fi
    rm -rf "$venv"
    say "making a virtual environment in $venv"
    "$1" -m venv "$venv"
}

python=$(find_python)
wanted=$(wanted_stamp "$python")
is_ready() { [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -z "$(missing_packages "$python")" ]; }
! is_ready || exit 0
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock" # two makes at once: the second waits, then finds it done
flock 9
! is_ready || exit 0
packages=$(missing_packages "$python")
# shellcheck disable=SC2086 # a list of words
[ -z "$packages" ] || apt_install $packages
make_venv "$python"
say "installing the project and its dependencies into $venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[all,dev]' ||
    fail "pip could not install the project's dependencies" "read pip's message above; a network is needed once"
printf '%s\n' "$wanted" >"$stamp"
say "ready"
