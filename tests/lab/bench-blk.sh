# Block devices side by side in one guest, the memory in the same guest, TCP over loopback where
# there is a network. Prints `BENCH DEVICE.LOAD.METRIC VALUE` lines:
#   DEVICE  ublk-shm (what xpm chooses on one host), ublk-tcp, nbd-direct: xpm; nbd-nbdkit: the kernel's nbd
#           set up by nbd-client to nbdkit's memory plugin; nvme-tcp: the kernel's NVMe/TCP, both ends, on a
#           RAM disk
#   LOAD    read-qd1, write-qd1, read-qd32, write-qd32: 4 KiB random; read-seq, write-seq: 1 MiB
#   METRIC  p50_us (4 KiB), p99_us (4 KiB), iops (4 KiB), mib_s (1 MiB)
# The devices take turns, and each number is the median of the rounds.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/bench-lib.sh"

ROUNDS=${1:-3}
SECONDS_EACH=${2:-2}
SIZE_MIB=256

start_site 1GiB
xpm_device ublk-tcp ublk --transport nbd-tcp
xpm_device ublk-shm ublk --transport shm
xpm_device nbd-direct nbd-direct
start_nbdkit $SIZE_MIB
device_of[nbd-nbdkit]=/dev/nbd15
modprobe brd rd_nr=1 rd_size=$((SIZE_MIB * 1024))
start_nvme /dev/ram0
device_of[nvme-tcp]=$device
note "devices: ${device_of[*]}"
fill $SIZE_MIB
take_turns read-qd1 write-qd1 read-qd32 write-qd32 read-seq write-seq
medians
end_nbdkit /dev/nbd15
