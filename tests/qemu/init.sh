#!/bin/busybox sh
# Process 1 of the guest, in its initramfs: mounts its root, with what was installed, and below memory for what is
# written. Then systemd is process 1, if $SYSTEMD is set. Else it runs $SCRIPT: what that prints and its exit status go to
# the second serial port, and the guest is switched off.
for module in /modules/*; do
    /bin/busybox insmod "$module"
done
/bin/busybox mkdir /debian /installed /over
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t squashfs -o ro "$ROOT" /debian
/bin/busybox mount -t squashfs -o ro "$INSTALLED" /installed
# Not swapped, as far as the kernel knows how (6.4): zswapd's own files must not lie in its swap.
memory() {
    /bin/busybox mount -t tmpfs -o noswap tmpfs "$1" 2>/dev/null || /bin/busybox mount -t tmpfs tmpfs "$1"
}
memory /over
/bin/busybox mkdir /over/upper /over/work
/bin/busybox mount -t overlay -o lowerdir=/installed:/debian,upperdir=/over/upper,workdir=/over/work overlay /root
/bin/busybox mount -t proc proc /root/proc
/bin/busybox mount -t sysfs sysfs /root/sys
/bin/busybox mount --move /dev /root/dev
memory /root/run
echo 1 >/root/sys/devices/system/cpu/cpu1/online
echo booted >/root/dev/ttyS1
[ -z "$SYSTEMD" ] || exec /bin/busybox switch_root /root /lib/systemd/systemd
exec /bin/busybox switch_root /root /bin/sh -c '
    exec </dev/null >/dev/ttyS1 2>&1
    export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run PYTHONPATH=/usr/lib/zswapd
    cd /usr/local/lib/zswapd-tests
    "$SCRIPT"
    echo "exit status $?"
    echo o >/proc/sysrq-trigger
    sleep infinity'
