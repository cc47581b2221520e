#!/bin/bash
# In the guest, as a service: what the units promise. The first step that fails ends it, with what systemd says.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin
TRIES=240

finish() {
    status=$?
    if [ $status != 0 ]; then
        systemctl --no-pager --full status zswapd-pager zswapd zswapd-swap zswapd-sleep || true
        journalctl --no-pager --boot | tail -n 150
    fi
    echo "exit status $status"
    [ $status = 0 ] || echo o >/proc/sysrq-trigger
}
trap finish EXIT

ok() {
    echo "ok after $SECONDS s: $*"
}
wait_for() { # what, and the command that tells
    local what=$1 try
    shift
    for ((try = 0; try < TRIES; try++)); do
        if "$@" >/dev/null 2>&1; then
            ok "$what"
            return
        fi
        sleep 0.5
    done
    echo "not in time: $what"
    exit 1
}
# Of the pager's status. Not zswapctl's, which takes seconds to start here.
of_pager() {
    python3 -ISc "
import sys
sys.path.insert(0, '/usr/lib/zswapd/zswapd')
from pager_socket import ask, socket_path
from pathlib import Path
status, _ = ask(socket_path(Path('/run/zswapd/mnt')), 'status')
print(dict(word.split('=') for word in status.split())['$1'])"
}
main_pid() { systemctl show --value --property MainPID "$1"; }
entered() { systemctl show --value --property ActiveEnterTimestampMonotonic "$1"; }
slept() { cat /sys/power/suspend_stats/success; }
is_swap() { grep -q ^/dev/loop /proc/swaps; }
differs() { [ "$1" != "$(main_pid "$2")" ] && systemctl is-active --quiet "$2"; }
stored() { systemctl show --value --property NFileDescriptorStore zswapd-pager; }
all_stored() { [ "$(stored)" = 5 ]; }
# What systemd has handed to the keeper that runs.
handed() { tr '\0' '\n' <"/proc/$(main_pid zswapd-pager)/environ" | sed -n 's/^LISTEN_FDNAMES=//p' | tr : '\n' | sort | xargs; }
other_pager() { local now; now=$(of_pager pid) && [ "$now" != "$1" ] && [ "$(of_pager standby)" != 0 ]; }

never() { # a command that is to fail
    if "$@"; then
        echo "it should not have been so: $*"
        exit 1
    fi
}
said() { journalctl --boot | grep -q "$@"; }

verify() {
    echo "$1" >/run/ask
    wait_for "every page is right $1" grep -q "^$1: 0 wrong$" /run/answers
}

# As it came up.
wait_for "the swap is attached at boot" systemctl is-active zswapd-swap
is_swap
((0 < $(entered zswapd-pager) && $(entered zswapd-pager) <= $(entered zswapd)))
(($(entered zswapd) <= $(entered zswapd-swap) && $(entered zswapd-swap) <= $(entered swap.target)))
ok "in the order: pager, zswapd, swap, swap.target"
never said -i "ordering cycle"
[ "$(of_pager protected)" = 1 ]
[ -z "$(handed)" ]
wait_for "systemd keeps five descriptors" all_stored
zswapctl status
for pid in $(of_pager keeper) $(of_pager pid) $(of_pager standby); do
    [ "$(cat /proc/$pid/oom_score_adj)" = -1000 ]
    grep -q '^NoNewPrivs:.*1$' /proc/$pid/status
    grep -q '^Seccomp:.*2$' /proc/$pid/status
done
read -r _ < /run/zswapd/mnt/mm_stat
python3 - <<'PYTHON'
import urllib.request
assert "zswapd_keeper_up 1.0" in urllib.request.urlopen("http://127.0.0.1:9839/metrics").read().decode()
PYTHON
ok "protected, confined, and seen"

cat >/run/workload.py <<'PYTHON'
import hashlib, mmap, os
COUNT = 40 << 8
def page(n):
    return hashlib.sha256(b"%d" % n).digest() * 32 + bytes(3072)
held = mmap.mmap(-1, COUNT * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for n in range(COUNT):
    held[n * 4096 : (n + 1) * 4096] = page(n)
print("filled", flush=True)
for line in open(os.open("/run/ask", os.O_RDWR)):
    wrong = sum(held[n * 4096 : (n + 1) * 4096] != page(n) for n in range(COUNT))
    print(f"{line.strip()}: {wrong} wrong", flush=True)
PYTHON
mkfifo /run/ask
systemd-run --quiet --unit workload --property MemoryMax=24M --property StandardOutput=file:/run/answers \
    python3 /run/workload.py
wait_for "a workload has pages in swap" grep -q filled /run/answers
verify "at first"
(($(awk '/^\/dev\/loop/ { print $4 }' /proc/swaps) > 10000))

# Python alone.
pager=$(of_pager pid)
before=$(main_pid zswapd)
kill -KILL "$before"
wait_for "a killed zswapd is started again" differs "$before" zswapd
[ "$(of_pager pid)" = "$pager" ]
systemctl restart zswapd
[ "$(of_pager pid)" = "$pager" ]
verify "with another zswapd"
before=$(main_pid zswapd)
kill -STOP "$before"
wait_for "the watchdog ends a zswapd that hangs" differs "$before" zswapd
[ "$(of_pager pid)" = "$pager" ]

# A pager.
before=$(of_pager pid)
kill -KILL "$before"
wait_for "a standby takes over" other_pager "$before"
verify "after a takeover"
wait_for "zswapd has heard of it" said "another pager has taken over"

# An upgrade, as make install has it: another file in the place of the old one.
before=$(of_pager pid)
program=/usr/lib/zswapd/zswapd/zswapd-pager
[ "$(readlink /proc/$before/exe)" = $program ]
cp $program $program.new
mv $program.new $program
[ "$(readlink /proc/$before/exe)" = "$program (deleted)" ]
systemctl reload zswapd-pager
wait_for "a reload puts what is installed in its place" other_pager "$before"
[ "$(readlink /proc/$(of_pager pid)/exe)" = $program ]
[ "$(readlink /proc/$(of_pager standby)/exe)" = $program ]
systemctl restart zswapd
verify "after an upgrade"

# The keeper, and then the keeper and its pagers.
before=$(main_pid zswapd-pager)
kill -KILL "$before"
wait_for "systemd starts another keeper" differs "$before" zswapd-pager
wait_for "which has a standby" other_pager "$pager"
[ "$(handed)" = "zswapd-control zswapd-counters zswapd-fuse zswapd-program zswapd-state" ]
# The program too is the one that was upgraded to.
[ "$(readlink /proc/$(of_pager standby)/exe)" = $program ]
wait_for "which systemd keeps on keeping" all_stored
verify "with another keeper"
before=$(main_pid zswapd-pager)
kill -KILL "$before" "$(of_pager pid)" "$(of_pager standby)"
wait_for "another keeper, with all pagers gone" differs "$before" zswapd-pager
verify "after all were killed"
wait_for "zswapd finds it" systemctl is-active --quiet zswapd
systemctl is-active zswapd-swap
never said "Stopping zswapd-swap"
is_swap

# Sleep: not without room for the pages.
never systemctl start systemd-suspend.service
[ "$(slept)" = 0 ]
is_swap
ok "the machine stays awake"
# With it, until somebody wakes the machine. What is swap by then is kept (systemd-suspend.service.d).
systemctl set-property --runtime workload.service MemoryMax=infinity
systemctl start systemd-suspend.service
[ "$(slept)" = 1 ]
[ -e /run/swaps-asleep ] && [ ! -s /run/swaps-asleep ]
ok "detached while it sleeps"
wait_for "attached when it wakes up" is_swap
verify "after a sleep"

# The way back.
systemctl stop zswapd-pager
never is_swap
for unit in zswapd-pager zswapd zswapd-swap; do
    [ "$(systemctl is-active $unit)" = inactive ]
done
[ ! -e /run/zswapd/mnt.sock ]
never grep /run/zswapd /proc/self/mountinfo
never pgrep "^zswapd-"
grep -qx "with another zswapd: 0 wrong" /run/answers
ok "a stop gives everything back"
systemctl start zswapd-swap
wait_for "a start makes all of it anew" is_swap
# The rest is the shutdown's, and in the kernel's log.
systemctl --no-block --job-mode=replace-irreversibly start poweroff.target
