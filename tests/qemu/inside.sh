#!/bin/sh
# In the guest: $SCENARIOS of tests/qemu/inside.
exec python3 -m tests.qemu.inside
