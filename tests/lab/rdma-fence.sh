# An old owner, and the keys of another grant, reach nothing.
. "$LAB_SCRIPTS/rdma-lib.sh"

dmesg_start
start_pool 128MiB a1 a2
for name in x y; do
    xpm alloc create $name --size 64MiB --stripe 2
done
rdmaprobe fence x
note "an owner of an older epoch is refused"
rdmaprobe foreign x y
note "a key of one grant is refused on a connection of another"
for name in x y; do
    xpm alloc delete $name
done
nothing_left
dmesg_clean
