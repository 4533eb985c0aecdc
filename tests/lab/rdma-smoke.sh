# RDMA in the guest without xpm: Soft-RoCE, verbs and the connection manager, by stock programs.
. "$LAB_SCRIPTS/rdma-lib.sh"

start_rxe
note "$(rdma link show rxe0/1)"
# Waiting rather than spinning: the guest's processors may take turns.
result=$(perftest ib_read_lat -e -n 200)
note "ib_read_lat: $result"
# Not perftest's -R: its two ends may each wait for the other's receive, and get no further than RNR NAKs.
rping -s -a "$ADDRESS" -C 20 -V >/run/lab/server.out 2>&1 &
server=$!
wait_for 20 rping -c -a "$ADDRESS" -C 20 -V -v
wait $server || fail "the server of rping: $(tail -n 20 /run/lab/server.out)"
note "rping, by the connection manager: 20 messages verified"
