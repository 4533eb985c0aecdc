# RDMA in the guest without xpm: Soft-RoCE, verbs and the connection manager, by a stock program.
. "$LAB_SCRIPTS/rdma-lib.sh"

start_rxe
note "$(rdma link show rxe0/1)"
# Waiting rather than spinning: the guest's processors may take turns.
result=$(perftest ib_read_lat -e -n 200)
note "ib_read_lat: $result"
result=$(perftest ib_read_lat -e -n 200 -R)
note "ib_read_lat, by the connection manager: $result"
