# Without the RDMA connection manager, at either end: queue pairs are connected by messages over TCP.
. "$LAB_SCRIPTS/rdma-lib.sh"

manager=/dev/infiniband/rdma_cm

# used NAME: RDMA connects, carries a verified load, and refuses who was shut out.
used() {
    attach "$1" 64MiB ublk --stripe 2
    all_rdma "$1" 2
    load "$device" 16 --do_verify=1
    all_rdma "$1" 2
    detach "$1"
    for name in x y; do
        xpm alloc create $name --size 32MiB --stripe 2
    done
    rdmaprobe fence x
    rdmaprobe foreign x y
    for name in x y; do
        xpm alloc delete $name
    done
    note "$2"
}

dmesg_start
start_pool 192MiB a1 a2
mv $manager $manager.away
# xpm-blk keeps its open descriptors of the manager, but it asks anew for each connection.
used client "the client has no connection manager"
for name in a1 a2; do
    kill "${appliance_pid[$name]}"
    wait "${appliance_pid[$name]}" || true
    start_appliance $name 192MiB
    wait_for 30 registered $name 2
done
used both "nobody has one"
mv $manager.away $manager
used appliance "the appliances have none"
nothing_left
dmesg_clean
