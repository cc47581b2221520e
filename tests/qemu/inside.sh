#!/bin/sh
# In the guest: $SCENARIOS of tests/qemu/inside.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run
cd "$(dirname "$0")/../.." || exit
exec "$PYTHON" -m tests.qemu.inside
