# vhost-user-blk disks side by side in one guest, served on the host. Prints `BENCH DEVICE.LOAD.METRIC VALUE` lines:
#   DEVICE  vhost-tcp, vhost-shm: xpm-blk, and an appliance of the host over TCP or shared memory; qsd-null, qsd-memory: QEMU's
#           storage daemon on nothing, and on a file in the host's memory; qsd-nbd-tcp, qsd-nbd-unix: the same,
#           connected to nbdkit's memory plugin
#   LOAD    read-qd1, write-qd1, read-qd32, write-qd32: 4 KiB random
#   METRIC  p50_us, p99_us, iops
# The devices take turns, and each number is the median of the rounds.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/bench-lib.sh"

ROUNDS=${1:-3}
SECONDS_EACH=${2:-2}

find_disks
note "devices: ${device_of[*]}"
fill 512
take_turns read-qd1 write-qd1 read-qd32 write-qd32
medians
