# An appliance is killed under load: the client notices, and tells lost memory from zeros.
. "$LAB_SCRIPTS/rdma-lib.sh"

# no_link_up NAME
no_link_up() {
    shown "$1" .links
    [ "$(shown "$1" 'any(.links[]; .state == "up")')" = false ]
}

is_lost() {
    shown "$1" .
    [ "$(shown "$1" '.state')" = lost ]
}

# Requests in flight end.
load_ended() {
    xpm blk show old --json
    ! kill -0 $fio_pid
}

start_pool 128MiB a1 a2
attach old 16MiB ublk --region-size 16MiB
all_rdma old 1
victim=$(shown old '.links[0].appliance_name')
dd if=/dev/urandom of="$device" bs=1M count=16 oflag=direct status=none
fio --name=load --filename="$device" --rw=randrw --bs=16k --iodepth=8 --direct=1 --ioengine=libaio \
    --time_based --runtime=120 >/run/lab/fio.out 2>&1 &
fio_pid=$!
sleep 3
# Else the shell would tell of it.
disown "${appliance_pid[$victim]}"
kill -KILL "${appliance_pid[$victim]}"
note "$victim is killed"
wait_for 15 no_link_up old
note "the client knows it: $(shown old '.links[0].reason')"
kill -0 $fio_pid || fail "I/O was not held: $(tail -n 5 /run/lab/fio.out)"

start_appliance "$victim" 128MiB
wait_for 30 is_lost old
note "$victim is back, and the device is lost"
wait_for 20 load_ended
! wait $fio_pid || fail "fio saw no error"
for at in 0 7 2047 4095; do
    refused 'Input/output error' dd if="$device" of=/dev/null bs=4k count=1 skip=$at iflag=direct
done
detach old

wait_for 20 registered "$victim" 2
attach new 64MiB ublk --stripe 2
all_rdma new 2
shown new '.links[].appliance_name' | grep "$victim" || fail "$victim lends nothing"
load "$device" 16 --do_verify=1
note "$victim lends memory again"
detach new
nothing_left
