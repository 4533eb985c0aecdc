# An allocation at addresses of a program, over RDMA: no appliance answers anything for it.
. "$LAB_SCRIPTS/rdma-lib.sh"

dmesg_start
start_pool 128MiB a1 a2
xpm alloc create m --size 64MiB --stripe 2
before=$(answered)
rdmaprobe mapped m
answered_none_since "$before"
note "no appliance answered a read or a write"
xpm alloc delete m
nothing_left
dmesg_clean
