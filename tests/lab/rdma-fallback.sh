# Where RDMA cannot be had, TCP is used and said to be; when RDMA is back, the load moves over to it.
. "$LAB_SCRIPTS/rdma-lib.sh"

devices=/dev/infiniband

# by TRANSPORT: whether all links of the device are up by it.
by() {
    local found
    found=$(shown moved '[.links[] | .transport + " " + .state] | unique | join(" ")')
    echo "the links are: $found"
    [ "$found" = "$1 up" ]
}

dmesg_start
# The transport is not asked for: it is chosen.
transport=
blk_settings='forbid-transports = ["shm", "nbd-unix"]'
start_pool 128MiB a1 a2
mv $devices $devices.away
attach moved 128MiB ublk --stripe 2
by nbd-tcp || fail "the links are not by TCP"
reason=$(shown moved '.links[0].reason')
note "without RDMA: $reason"
grep -q rdma <<<"$reason" || fail "that does not say why RDMA is not used"
fio --name=load --filename="$device" --rw=randwrite --bs=16k --iodepth=8 --size=32M --direct=1 --ioengine=libaio \
    --verify=crc32c --verify_fatal=1 --verify_backlog=64 --time_based --runtime=18 \
    --output-format=terse --terse-version=3 >/run/lab/fio.out 2>&1 &
fio_pid=$!
sleep 2
mv $devices.away $devices
wait_for 20 by rdma
kill -0 $fio_pid || fail "the load ended early: $(tail -n 5 /run/lab/fio.out)"
[ "$(shown moved '.links[0].reason')" = null ] || fail "a reason is left over"
note "under load all links moved to RDMA"
wait $fio_pid || fail "fio: $(tail -n 5 /run/lab/fio.out)"
[ "$(shown moved '.counters.errors')" -eq 0 ] || fail "requests failed"
note "all that was written is verified"
detach moved
nothing_left
dmesg_clean
