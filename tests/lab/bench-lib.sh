# The common part of the benchmarks of block devices: xpm's daemons in the guest, and devices that take turns under fio. Sourced by them
# after lib.sh, with ROUNDS and SECONDS_EACH set.
declare -A device_of

# wait_port PORT: until a server listens there.
wait_port() {
    wait_for 20 bash -c "exec 3<>/dev/tcp/127.0.0.1/$1"
}

# start_site MEMORY: an allocator, an appliance with so much memory, and xpm-blk, all in this guest.
start_site() {
    XPM_ALLOCATOR=http://127.0.0.1:7700
    export XPM_ALLOCATOR
    start_daemon allocator xpm-allocator --listen 127.0.0.1:7700 --data /tmp/allocator
    wait_port 7700
    start_daemon appliance xpm-appliance --memory "$1" --name local --state /tmp/appliance --listen 127.0.0.1:7710 \
        --nbd 127.0.0.1:7711 --run-dir /run/xpm-appliance --allocator $XPM_ALLOCATOR
    wait_for 60 bash -c 'xpm appliance list --json | grep -q "\"up\""'
    start_blk
    modprobe ublk_drv
    modprobe nbd
}

# xpm_device DEVICE FORM [OPTION...]: an allocation of $SIZE_MIB MiB in that form takes its turns.
xpm_device() {
    xpm alloc create "$1" --size "${SIZE_MIB}MiB"
    device_of[$1]=$(xpm blk attach "$1" --as "$2" "${@:3}")
}

# start_nbdkit SIZE_MIB: nbdkit's memory plugin over TCP by two connections of nbd-client, which is what people set up.
start_nbdkit() {
    start_daemon nbdkit nbdkit -f -i 127.0.0.1 -p 10900 memory "${1}M"
    wait_port 10900
    nbd-client -C 2 127.0.0.1 10900 /dev/nbd15 >/dev/null
    echo none >/sys/block/nbd15/queue/scheduler
}

# nbdkit does not end while somebody is connected.
end_nbdkit() {
    local device
    for device in "$@"; do nbd-client -d "$device" >/dev/null; done
}

# start_nvme DEVICE: the kernel's NVMe over TCP to this device, both ends in this guest; $device is its path then.
start_nvme() {
    local target=/sys/kernel/config/nvmet name=xpm-lab
    modprobe nvmet-tcp
    modprobe nvme-tcp
    mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
    mkdir -p $target/subsystems/$name/namespaces/1 $target/ports/1
    echo 1 >$target/subsystems/$name/attr_allow_any_host
    echo -n "$1" >$target/subsystems/$name/namespaces/1/device_path
    echo 1 >$target/subsystems/$name/namespaces/1/enable
    echo tcp >$target/ports/1/addr_trtype
    echo ipv4 >$target/ports/1/addr_adrfam
    echo 127.0.0.1 >$target/ports/1/addr_traddr
    echo 4420 >$target/ports/1/addr_trsvcid
    ln -s $target/subsystems/$name $target/ports/1/subsystems/$name
    echo "transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=$name,nr_io_queues=2" >/dev/nvme-fabrics
    wait_for 10 test -b /dev/nvme0n1
    device=/dev/nvme0n1
}

# Adds the disks that the host serves to those that take turns: $LAB_DISKS lists the slots of PCI they are in.
find_disks() {
    local disk slot name
    modprobe virtio_blk
    for disk in $LAB_DISKS; do
        slot=${disk%%:*} name=${disk#*:}
        for path in /sys/bus/pci/devices/0000:00:"$slot".0/virtio*/block/*; do
            [ -d "$path" ] || fail "the guest has no disk $name"
            device_of[$name]=/dev/${path##*/}
        done
    done
}

# measure DEVICE LOAD: one line "DEVICE LOAD METRIC VALUE" for each metric.
measure() {
    local rw=rand${2%%-*} block=4k depth=${2##*-qd}
    case $2 in *-seq) rw=${2%%-*} block=1M depth=4 ;; esac
    fio --name=bench --filename="${device_of[$1]}" --rw="$rw" --bs=$block --iodepth="$depth" --ioengine=io_uring \
        --direct=1 --time_based --runtime="$SECONDS_EACH" --randrepeat=0 --clat_percentiles=0 --lat_percentiles=1 \
        --output-format=json --output=/tmp/fio.json
    # The latency includes the submission, since some drivers do their work in it.
    jq -r --arg device "$1" --arg load "$2" '
        .jobs[0][$load | split("-")[0]] |
        if $load | endswith("-seq") then "mib_s \(.bw_bytes / 1048576 * 10 | round / 10)"
        else "p50_us \(.lat_ns.percentile["50.000000"] / 1000)", "p99_us \(.lat_ns.percentile["99.000000"] / 1000)",
            "iops \(.iops | round)"
        end | "\($device) \($load) \(.)"' /tmp/fio.json
}

# The medians of what `measure` said, from /tmp/results.
medians() {
    python3 - <<'PYTHON'
import statistics
values = {}
for line in open("/tmp/results"):
    *key, value = line.split()
    values.setdefault(".".join(key), []).append(float(value))
for key, found in values.items():
    print("BENCH", key, statistics.median(found))
PYTHON
}

# take_turns LOAD...: measures all devices under these loads in turn, so that what disturbs the machine disturbs all.
take_turns() {
    local round load name
    for ((round = 1; round <= ROUNDS; round++)); do
        for load in "$@"; do
            for name in "${!device_of[@]}"; do
                measure "$name" "$load" >>/tmp/results
            done
        done
        note "round $round of $ROUNDS"
    done
}

# fill MIB: writes all of each device, so that no memory is found for it later.
fill() {
    local device
    for device in "${device_of[@]}"; do
        dd if=/dev/zero of="$device" bs=1M count="$1" oflag=direct status=none
    done
}
