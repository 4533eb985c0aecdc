# Swap of every kind under one program that has half of its memory: a memory cgroup limits it, so that nothing else in the
# guest is short. Prints `BENCH DEVICE.run_s VALUE` lines, how long the program took to fill its memory and verify each page once:
#   DEVICE  ublk-tcp, ublk-shm, nbd-direct: xpm, the appliance in this guest; vhost-tcp, vhost-shm: xpm's
#           vhost-user-blk, all of it on the host, which is not emulated; nbd-tcp (two connections), nbd-unix: the kernel's nbd set up by nbd-client to nbdkit's
#           memory plugin; nvme-tcp: the kernel's NVMe/TCP, both ends, to a RAM disk; zram; brd: a RAM disk; virtio-file: a file
#           of the host; none: no limit and no swap
# The devices take turns, and each number is the median of the rounds. A second set of lines, `swap DEVICE ...`, says what requests there were.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/bench-lib.sh"

ROUNDS=${1:-3}
HOG_MIB=${2:-96}
SIZE_MIB=128
MIB=$((1 << 20))

# Counters of a device: requests and KiB that were read, and that were written.
counters() {
    awk '{print $1, $3 / 2, $5, $7 / 2}' "/sys/block/${1#/dev/}/stat"
}

# run_hog NAME GROUP: the program in this cgroup, and how long it took.
run_hog() {
    local start=$EPOCHREALTIME
    (in_group "$2" memhog "$HOG_MIB" --passes 1) >/tmp/hog.out || fail "memhog on $1: $(cat /tmp/hog.out)"
    awk -v name="$1" -v from="$start" -v to="$EPOCHREALTIME" 'BEGIN {print name, "run_s", to - from}' >>/tmp/results
}

# measure_swap NAME: one run with this device as the only swap.
measure_swap() {
    local device=${device_of[$1]} before
    mkswap "$device" >/dev/null
    swapon "$device"
    before=$(counters "$device")
    run_hog "$1" "$limited"
    echo "$before $(counters "$device")" | awk -v name="$1" '{
        printf "swap %s: %d reads of %.0f KiB, %d writes of %.0f KiB\n", name,
            $5 - $1, ($6 - $2) / ($5 - $1 + 1e-9), $7 - $3, ($8 - $4) / ($7 - $3 + 1e-9)}'
    swapoff "$device"
}

start_site 1GiB
xpm_device ublk-tcp ublk --transport nbd-tcp
xpm_device ublk-shm ublk --transport shm
xpm_device nbd-direct nbd-direct
start_nbdkit $SIZE_MIB
device_of[nbd-tcp]=/dev/nbd15
start_daemon nbdkit-unix nbdkit -f -U /run/nbdkit.sock memory ${SIZE_MIB}M
wait_for 20 test -S /run/nbdkit.sock
nbd-client -unix /run/nbdkit.sock /dev/nbd14 >/dev/null
echo none >/sys/block/nbd14/queue/scheduler
device_of[nbd-unix]=/dev/nbd14
modprobe brd rd_nr=2 rd_size=$((SIZE_MIB * 1024))
start_nvme /dev/ram0
device_of[nvme-tcp]=$device
device_of[brd]=/dev/ram1
modprobe zram
echo ${SIZE_MIB}M >/sys/block/zram0/disksize
device_of[zram]=/dev/zram0
find_disks
note "devices: ${device_of[*]}"

make_group free
free=$group
make_group limited memory.max=$((HOG_MIB * MIB / 2))
limited=$group
for ((round = 1; round <= ROUNDS; round++)); do
    run_hog none "$free"
    for name in "${!device_of[@]}"; do
        measure_swap "$name"
    done
    note "round $round of $ROUNDS: $(tail -n $((${#device_of[@]} + 1)) /tmp/results | awk '{printf "%s %s  ", $1, $3}')"
done
medians
end_nbdkit /dev/nbd14 /dev/nbd15
