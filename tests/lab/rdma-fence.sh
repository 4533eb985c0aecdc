# An old owner, and the keys of another grant, reach nothing.
. "$LAB_SCRIPTS/rdma-lib.sh"

dmesg_start
start_pool 384MiB a1 a2
rdmaprobe fence x
note "an owner of an older epoch is refused"
rdmaprobe foreign x y
note "a key of one grant is refused on a connection of another"
nothing_left
dmesg_clean
