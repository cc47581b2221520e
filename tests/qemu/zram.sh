#!/bin/sh
# In the guest: writes parts of /dev/vda to zram with each of $ALGORITHMS (by commas), and says what zram has made of it.
# $PARTS, by commas: the first byte of each, a colon, and how many there are.
set -eu
zram=/sys/block/zram0
for algorithm in $(echo "$ALGORITHMS" | tr , ' '); do
    for part in $(echo "$PARTS" | tr , ' '); do
        echo 1 >$zram/reset
        echo "$algorithm" >$zram/comp_algorithm
        echo "${part#*:}" >$zram/disksize
        dd if=/dev/vda of=/dev/zram0 bs=1M iflag=direct,skip_bytes,count_bytes oflag=direct status=none \
            "skip=${part%:*}" "count=${part#*:}"
        echo "mm_stat $algorithm $(cat $zram/mm_stat)"
    done
done
