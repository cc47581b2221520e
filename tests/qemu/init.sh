#!/bin/busybox sh
# Process 1 of the guest, in its initramfs: makes the host's root directory the guest's, read-only, and runs $SCRIPT.
# What it prints and its exit status go to the second serial port; then the guest is switched off.
for module in /modules/*; do
    /bin/busybox insmod "$module"
done
if [ -n "$INSTALLED" ]; then
    # What systemd writes goes to memory, over the host's directory.
    /bin/busybox mkdir /host /over
    /bin/busybox mount -t virtiofs -o ro host /host
    /bin/busybox mount -t tmpfs -o noswap tmpfs /over
    /bin/busybox mkdir /over/upper /over/work
    /bin/busybox mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work overlay /root
    /bin/busybox cp -a "/host$INSTALLED/." /root
else
    /bin/busybox mount -t virtiofs -o ro host /root
fi
/bin/busybox mount -t proc proc /root/proc
/bin/busybox mount -t sysfs sysfs /root/sys
/bin/busybox mount -t devtmpfs devtmpfs /root/dev
# Not swapped, as far as the kernel knows how (6.4): zswapd's own files must not lie in its swap.
/bin/busybox mount -t tmpfs -o noswap tmpfs /root/run 2>/dev/null || /bin/busybox mount -t tmpfs tmpfs /root/run
echo 1 >/root/sys/devices/system/cpu/cpu1/online
echo booted >/root/dev/ttyS1
[ -z "$INSTALLED" ] || exec /bin/busybox switch_root /root /lib/systemd/systemd
exec /bin/busybox switch_root /root /bin/sh -c '
    exec </dev/null >/dev/ttyS1 2>&1
    "$SCRIPT"
    echo "exit status $?"
    echo o >/proc/sysrq-trigger
    sleep infinity'
