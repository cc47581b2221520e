#!/bin/sh
# In the guest: more memory is written than it has, and the only swap is zswapd's. Nothing has a limit of its own.
# A hog fills $MEBIBYTES; with $LOCKING=off the pager may not lock its memory.
set -eu
confined=
unsafe=
if [ "$LOCKING" = off ]; then
    confined="setpriv --bounding-set=-ipc_lock prlimit --memlock=0"
    unsafe=--unsafe
fi
mkdir -p /run/zswapd/mnt
# shellcheck disable=SC2086 # words
$confined zswapd run --set swap.size=256MiB --set metrics.listen= >/run/zswapd/log 2>&1 &
daemon=$!
until grep -q serving /run/zswapd/log; do
    kill -0 $daemon || { cat /run/zswapd/log; exit 1; }
    sleep 0.1
done
cat /run/zswapd/log

# What attach asks for: it refuses the kernel's default, then too little kept free.
if [ "$LOCKING" = on ]; then
    enough=$(sysctl -n vm.min_free_kbytes)
    sysctl -qw vm.min_free_kbytes=512
    ! zswapctl attach
    sysctl -qw vm.watermark_boost_factor=0
    ! zswapctl attach
    sysctl -qw vm.min_free_kbytes="$enough"
fi
sysctl -qp /usr/lib/sysctl.d/60-zswapd.conf
zswapctl attach --json $unsafe

# Minor and major page faults of the threads that serve pages (proc_pid_stat(5)).
faults() {
    cat /proc/[0-9]*/task/*/stat | awk -v when="$1" '$2 ~ /^\(worker-/ { print "faults", when, $10, $12 }'
}

status=0
faults before
printf 'write\nwrite\nwrite\n' | ./hog "$MEBIBYTES" || status=$?
faults after
grep -E '^(pswpin|pswpout|oom_kill) ' /proc/vmstat
grep VmSwap "/proc/$daemon/status"
zswapctl status --json >/dev/null
zswapctl detach --json
kill $daemon
wait $daemon || status=$?
tail -n 1 /run/zswapd/log
exit $status
