# The appliances stand still for ten seconds, and reads and writes go on in each of them.
. "$LAB_SCRIPTS/rdma-lib.sh"

# Requests that the device has completed.
completed() {
    local reads writes
    read -r reads _ _ _ writes _ <"/sys/block/${device#/dev/}/stat"
    echo $((reads + writes))
}

dmesg_start
start_pool 128MiB a1 a2
attach load 128MiB ublk --stripe 2
all_rdma load 2
fio --name=load --filename="$device" --rw=randwrite --bs=16k --iodepth=8 --size=32M --direct=1 --ioengine=libaio \
    --verify=crc32c --verify_fatal=1 --verify_backlog=64 --time_based --runtime=20 \
    --output-format=terse --terse-version=3 >/run/lab/fio.out 2>&1 &
fio_pid=$!
sleep 3
kill -STOP "${appliance_pid[@]}"
note "the appliances are stopped"
passed=()
last=$(completed)
for _ in {1..10}; do
    sleep 1
    now=$(completed)
    passed+=($((now - last)))
    last=$now
done
kill -CONT "${appliance_pid[@]}"
note "requests in each second: ${passed[*]}"
for requests in "${passed[@]}"; do
    [ "$requests" -gt 0 ] || fail "there was a second without one"
done
wait $fio_pid || fail "fio: $(tail -n 5 /run/lab/fio.out)"
all_rdma load 2
[ "$(shown load '"\(.counters.errors) \([.links[].reconnects] | unique | join(" "))"')" = "0 0" ] ||
    fail "requests failed, or links were made again: $(xpm blk show load)"
note "all that was written is verified"
detach load
nothing_left
dmesg_clean
