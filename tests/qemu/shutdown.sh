#!/bin/bash
# In the guest, as a service: memory is used up when the machine is told to $ACTION. A hog that rewrites all of its pages
# is a service as others are. A second one ends with nothing but the machine: when systemd asks all that is left to end,
# with the swap detached, it looks at its pages and says so.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin

mkfifo /run/ask
cat >/run/holder <<'HOLDER'
#!/bin/bash
(trap '' TERM; exec "$HOG" 48 <>/run/ask >/run/held) &
hog=$!
ask() {
    echo $1 >/run/ask
    until [ "$(grep -c "^hog: $1:" /run/held)" = $2 ]; do sleep 0.2; done
}
at_the_end() {
    grep -q ^/dev/loop /proc/swaps && echo "at the end: swap is attached" >/dev/ttyS1
    ask check 1
    tail -n 1 /run/held | sed 's/^/at the end: /' >/dev/ttyS1
    kill -KILL $hog
    exit
}
trap at_the_end TERM
ask write 1
while :; do
    sleep 1 &
    wait $! || true
done
HOLDER
chmod +x /run/holder
# Neither is told to end when the machine is, but when all else is done.
systemd-run --quiet --unit holder --property DefaultDependencies=no --property IgnoreOnIsolate=yes \
    --setenv HOG="$HOG" /run/holder
until [ -s /run/held ]; do sleep 0.2; done
systemd-run --quiet --unit hog sh -c 'yes write | "$0" "$1" >/run/rounds' "$HOG" "$MEBIBYTES"
until [ -s /run/rounds ]; do sleep 0.5; done
until [ "$(awk '/^\/dev\/loop/ { print $4 }' /proc/swaps)" -gt 100000 ]; do sleep 0.5; done
cat /proc/swaps
grep -E '^(pswpin|pswpout|oom_kill) ' /proc/vmstat
echo "exit status 0"
systemctl --no-block --job-mode=replace-irreversibly start "$ACTION.target"
