# Block devices side by side in one guest, the memory in the same guest, TCP over loopback where
# there is a network. Prints `BENCH DEVICE.LOAD.METRIC VALUE` lines:
#   DEVICE  ublk-shm (what xpm chooses on one host), ublk-tcp, nbd-direct: xpm; nbd-nbdkit: the kernel's nbd
#           set up by nbd-client to nbdkit's memory plugin; nvme-tcp: the kernel's NVMe/TCP, both ends, on a
#           RAM disk
#   LOAD    read-qd1, write-qd1, read-qd32, write-qd32: 4 KiB random; read-seq, write-seq: 1 MiB
#   METRIC  p50_us (4 KiB), p99_us (4 KiB), iops (4 KiB), mib_s (1 MiB)
# The devices take turns, and each number is the median of the rounds.
. "$LAB_SCRIPTS/lib.sh"

ROUNDS=${1:-3}
SECONDS_EACH=${2:-2}
SIZE_MIB=256
declare -A device_of

# wait_port PORT: until a server listens there.
wait_port() {
    wait_for 20 bash -c "exec 3<>/dev/tcp/127.0.0.1/$1"
}

start_xpm() {
    XPM_ALLOCATOR=http://127.0.0.1:7700
    export XPM_ALLOCATOR
    start_daemon allocator xpm-allocator --listen 127.0.0.1:7700 --data /tmp/allocator
    wait_port 7700
    start_daemon appliance xpm-appliance --memory 1GiB --name local --state /tmp/appliance --listen 127.0.0.1:7710 \
        --nbd 127.0.0.1:7711 --run-dir /run/xpm-appliance --allocator $XPM_ALLOCATOR
    wait_for 60 bash -c 'xpm appliance list --json | grep -q "\"up\""'
    start_blk
    modprobe ublk_drv
    modprobe nbd
    xpm_device ublk-tcp ublk --transport nbd-tcp
    xpm_device ublk-shm ublk --transport shm
    xpm_device nbd-direct nbd-direct
}

# xpm_device DEVICE FORM [OPTION...]
xpm_device() {
    xpm alloc create "$1" --size ${SIZE_MIB}MiB
    device_of[$1]=$(xpm blk attach "$1" --as "$2" "${@:3}")
}

start_nbdkit() {
    start_daemon nbdkit nbdkit -f -i 127.0.0.1 -p 10900 memory ${SIZE_MIB}M
    wait_port 10900
    nbd-client -C 2 127.0.0.1 10900 /dev/nbd15 >/dev/null
    echo none >/sys/block/nbd15/queue/scheduler
    device_of[nbd-nbdkit]=/dev/nbd15
}

start_nvme() {
    local target=/sys/kernel/config/nvmet name=xpm-lab
    modprobe brd rd_nr=1 rd_size=$((SIZE_MIB * 1024))
    modprobe nvmet-tcp
    modprobe nvme-tcp
    mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
    mkdir -p $target/subsystems/$name/namespaces/1 $target/ports/1
    echo 1 >$target/subsystems/$name/attr_allow_any_host
    echo -n /dev/ram0 >$target/subsystems/$name/namespaces/1/device_path
    echo 1 >$target/subsystems/$name/namespaces/1/enable
    echo tcp >$target/ports/1/addr_trtype
    echo ipv4 >$target/ports/1/addr_adrfam
    echo 127.0.0.1 >$target/ports/1/addr_traddr
    echo 4420 >$target/ports/1/addr_trsvcid
    ln -s $target/subsystems/$name $target/ports/1/subsystems/$name
    echo "transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=$name,nr_io_queues=2" >/dev/nvme-fabrics
    wait_for 10 test -b /dev/nvme0n1
    device_of[nvme-tcp]=/dev/nvme0n1
}

# measure DEVICE LOAD: one line "DEVICE LOAD METRIC VALUE" for each metric.
measure() {
    local rw=rand${2%%-*} block=4k depth=${2##*-qd}
    case $2 in *-seq) rw=${2%%-*} block=1M depth=4 ;; esac
    fio --name=bench --filename="${device_of[$1]}" --rw="$rw" --bs=$block --iodepth="$depth" --ioengine=io_uring \
        --direct=1 --time_based --runtime="$SECONDS_EACH" --randrepeat=0 --clat_percentiles=0 --lat_percentiles=1 \
        --output-format=json --output=/tmp/fio.json
    python3 - "$1" "$2" <<'PYTHON'
import json, sys
device, load = sys.argv[1:]
job = json.load(open("/tmp/fio.json"))["jobs"][0]
side = job[load.split("-")[0]]
if load.endswith("-seq"):
    print(device, load, "mib_s", round(side["bw_bytes"] / (1 << 20), 1))
else:
    # With the submission: some drivers do their work in it.
    percentile = side["lat_ns"]["percentile"]
    print(device, load, "p50_us", percentile["50.000000"] / 1000)
    print(device, load, "p99_us", percentile["99.000000"] / 1000)
    print(device, load, "iops", round(side["iops"]))
PYTHON
}

medians() {
    python3 - <<'PYTHON'
import statistics
values = {}
for line in open("/tmp/results"):
    device, load, metric, value = line.split()
    values.setdefault(f"{device}.{load}.{metric}", []).append(float(value))
for key, found in values.items():
    print("BENCH", key, statistics.median(found))
PYTHON
}

start_xpm
start_nbdkit
start_nvme
note "devices: ${device_of[*]}"
for device in "${device_of[@]}"; do
    dd if=/dev/zero of="$device" bs=1M count=$SIZE_MIB oflag=direct status=none
done
for ((round = 1; round <= ROUNDS; round++)); do
    for load in read-qd1 write-qd1 read-qd32 write-qd32 read-seq write-seq; do
        for name in "${!device_of[@]}"; do
            measure "$name" $load >>/tmp/results
        done
    done
    note "round $round of $ROUNDS"
done
medians
