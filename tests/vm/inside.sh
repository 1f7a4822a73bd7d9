#!/bin/sh
# What happens inside the machine, one step for each argument; `prepare` runs at build time, without a booted system.
set -eu
umask 022
export PATH=/opt/edge-agent/bin:/usr/sbin:/usr/bin:/sbin:/bin
SOURCE=/opt/source
REPO=/root/fleet
BROKER=127.0.0.1:8883

prepare() { # publisher, releases 1.0.0 (signed) and 1.1.0 (built), an enrolled device that has nothing yet
    cd /root
    systemctl disable mosquitto
    python -I $SOURCE/models/parts/clip.py /srv/clip.avi --seconds 2
    chgrp edge-agent /etc/edge-agent/agent.toml
    chmod 640 /etc/edge-agent/agent.toml
    edge-ota init $REPO
    sed -i 's/^device_certificate_days.*/device_certificate_days = 365/; s/^server_certificate_days.*/server_certificate_days = 365/' $REPO/repo.toml
    runuser -u edge-agent -- /opt/edge-agent/bin/edge-agent enroll --device cam-1 >request.json
    edge-ota enroll $REPO request.json --broker $BROKER --renewal https://127.0.0.1:8884 --out bundle.json
    install -o edge-agent -m 600 bundle.json /run/bundle.json
    runuser -u edge-agent -- /opt/edge-agent/bin/edge-agent enroll --bundle /run/bundle.json
    edge-ota release $REPO --spec $SOURCE/models/digits/1.0.0/spec.toml
    edge-ota publish $REPO
    edge-ota grant $REPO cam-1 digits 1.0.0
    edge-ota release $REPO --spec $SOURCE/models/digits/1.1.0/spec.toml
}

broker() { # (re)start the broker with the certificates that are valid now
    systemctl stop broker 2>/dev/null || true
    mkdir -p /etc/mosquitto/edge
    cp $SOURCE/packaging/mosquitto/mosquitto.conf /etc/mosquitto/mosquitto.conf
    cp $SOURCE/packaging/mosquitto/acl $REPO/revoked.pem $REPO/keys/ca.pem $REPO/keys/broker.pem \
        $REPO/keys/broker.key /etc/mosquitto/edge/
    chown -R mosquitto /etc/mosquitto/edge
    systemctl reset-failed broker 2>/dev/null || true
    systemd-run --quiet --unit=broker mosquitto -c /etc/mosquitto/mosquitto.conf
    sleep 2
    systemctl is-active broker || { journalctl -u broker -n 5 -o cat; return 1; }
}

servers() { # (re)start block server and enrolment listener
    systemctl stop blocks listener 2>/dev/null || true
    systemctl reset-failed blocks listener 2>/dev/null || true
    systemd-run --quiet --unit=blocks --property=Restart=always /opt/edge-agent/bin/edge-ota serve $REPO --broker $BROKER
    systemd-run --quiet --unit=listener --property=Restart=always \
        /opt/edge-agent/bin/edge-ota listen $REPO --bind 127.0.0.1:8884 --broker $BROKER
}

reissue() { # what a fleet does in a year: every key and certificate replaced, some of them twice
    for key in root-1 root-2 timestamp snapshot targets director release-digits root-3 timestamp root-1; do
        edge-ota rotate $REPO $key | head -1
    done
    edge-ota broker-certificate $REPO 127.0.0.1 localhost
    edge-ota sticks $REPO --rotate timestamp
    edge-ota sticks $REPO --rotate root-2
}

newest() { # publish and grant 1.1.0
    edge-ota publish $REPO
    edge-ota grant $REPO cam-1 digits 1.1.0
}

stick() { # write a stick: FILE SYSTEM on /dev/vdb, as a directory or a zip
    mkdir -p /media/stick
    mount -t vfat /dev/vdb /media/stick
    rm -rf /media/stick/*
    edge-ota bundle $REPO cam-1 /media/stick/$1
    sync
    umount /media/stick
}

plug() { # mount the stick as an automounter would, readable for all and nothing else
    mkdir -p /media/stick
    mount -t vfat -o ro,nosuid,nodev,noexec,umask=022 /dev/vdb /media/stick
}

version() { # the committed version, asked from the daemon without the weight of the command
    python3 -IS - <<END
import json, socket
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect("/run/edge-agent/control.sock")
    asked.sendall(b"GET /status HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    with asked.makefile("rb") as answer:
        line = json.loads(answer.read().partition(b"\\r\\n\\r\\n")[2])["lines"]["digits"]
print(line["committed"], line["update"])
END
}

serves() { # does the daemon serve that version, committed?
    version 2>/dev/null | tee /run/version | grep -q "^$1 " || { cat /run/version; return 1; }
}

kept_clock_stays() { # as if a time service had set the clock a year too early: the kernel says it is synchronised
    systemctl unmask --runtime edge-agent-clock 2>/dev/null || true
    now=$(date +%s)
    date -u -s @$((now - 300 * 86400)) >/dev/null
    python3 - <<END
import ctypes
class Timex(ctypes.Structure):
    _fields_ = [("modes", ctypes.c_uint), ("longs", ctypes.c_long * 4), ("status", ctypes.c_int), ("rest", ctypes.c_byte * 512)]
state = Timex()
libc = ctypes.CDLL(None)
libc.adjtimex(ctypes.byref(state))
# ADJ_STATUS and ADJ_MAXERROR: without STA_UNSYNC, and without the error for which the kernel would set it again
state.modes, state.status = 0x0014, state.status & ~0x0040
state.longs[2] = 0
assert libc.adjtimex(ctypes.byref(state)) >= 0
END
    systemctl start edge-agent-clock
    [ "$(date +%s)" -lt $((now - 299 * 86400)) ] || { date; return 1; }
    edge-agent clock | grep verdict # as root it could set the clock, too
    [ "$(date +%s)" -lt $((now - 299 * 86400)) ]
}

clock_verdict() { # what the clock unit said last; by its invocation, because the journal sorts by the clock
    said=$(systemctl show --property=InvocationID --value edge-agent-clock)
    journalctl --sync
    journalctl -o cat _SYSTEMD_INVOCATION_ID=$said | grep verdict
}

step=$1
shift
"$step" "$@"
