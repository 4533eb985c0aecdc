# The common part of the RDMA scenarios. Soft-RoCE gives the guest's network device verbs; the allocator and
# the appliances run in the guest too, for both ends need such a device.
. "$LAB_SCRIPTS/lib.sh"

ADDRESS=10.0.2.15
export XPM_ALLOCATOR=http://$ADDRESS:7700
# On one host shared memory would be chosen.
transport=rdma
declare -A appliance_pid

start_rxe() {
    local module
    # The kernel refuses the link without CRC32 and gives no reason.
    for module in crc32_generic crc32_pclmul; do
        ! has_module $module || load_module $module
    done
    load_module rdma_rxe rdma_ucm ib_uverbs
    # Room for 4 KiB in a packet, as RoCE usually has.
    busybox ip link set eth0 mtu 9000
    [ -e /sys/class/infiniband/rxe0 ] || rdma link add rxe0 type rxe netdev eth0
    wait_for 10 grep ACTIVE /sys/class/infiniband/rxe0/ports/1/state
}

# perftest PROGRAM OPTION...: one of perftest's programs between two processes of the guest, 4 KiB at a time;
# prints its line of results.
perftest() {
    local words=("$@" -d rxe0 -x 1 -s 4096 -F) server
    "${words[@]}" >/run/lab/server.out 2>&1 &
    server=$!
    # It says that it waits for a client before it does.
    wait_for 20 ask_server "${words[@]}"
    wait $server || fail "the server of $*: $(tail -n 20 /run/lab/server.out)"
    grep '^ *4096 ' /run/lab/client.out || fail "$* printed no result: $(cat /run/lab/client.out)"
}

ask_server() {
    "$@" $ADDRESS >/run/lab/client.out 2>&1 || { tail -n 20 /run/lab/client.out && return 1; }
}

# start_appliance NAME MEMORY: NAME is a digit behind a letter; state and ports are its own.
start_appliance() {
    local port=77${1:1} dir=/run/$LAB_NAME/$1
    start_daemon "$1" xpm-appliance --insecure --name "$1" --memory "$2" --allocator $XPM_ALLOCATOR \
        --listen $ADDRESS:"$port"0 --nbd $ADDRESS:"$port"1 --rdma $ADDRESS:"$port"2 --state "$dir" --run-dir "$dir"
    appliance_pid[$1]=$pid
}

# start_pool MEMORY NAME...: Soft-RoCE, an allocator, appliances that lend so much each, and xpm-blk.
start_pool() {
    local memory=$1 name
    shift
    start_rxe
    # All daemons share the emulated processor with Soft-RoCE: with a heartbeat of 1 s, appliances that register memory or run
    # beside a load count as silent now and then, and an allocation is refused.
    start_daemon allocator xpm-allocator --insecure --listen $ADDRESS:7700 --heartbeat 3s --data "/run/$LAB_NAME/allocator"
    wait_for 20 xpm appliance list
    for name in "$@"; do
        start_appliance "$name" "$memory"
    done
    wait_for 60 appliances_up $#
    start_blk
    note "appliances: $*"
}

# appliances_up COUNT: whether so many are heard.
appliances_up() {
    xpm appliance list
    [ "$(xpm appliance list --json | grep -o '"state": *"up"' | wc -l)" -eq "$1" ]
}

# registered NAME TIMES: whether the allocator has answered each life of the appliance. One that was killed
# a moment ago still counts as up.
registered() {
    [ "$(grep -c 'registered with the allocator' "/run/lab/$LAB_NAME-$1.log")" -eq "$2" ]
}

# counted NAME: the sum of a counter over all appliances, as of their last heartbeats.
counted() {
    xpm appliance list --json | jq --arg name "$1" '[.[].status.counters[$name]] | add // 0'
}

# shown NAME FILTER: jq's filter on the device that `xpm blk show` shows.
shown() {
    xpm blk show "$1" --json | jq -r "$2"
}

# links_are NAME: how many links the device has, and the transports and states that they have.
links_are() {
    shown "$1" '"\(.links | length) \([.links[] | .transport + " " + .state] | unique | join(" "))"'
}

# all_rdma NAME COUNT: the device has so many links, all of them up and RDMA.
all_rdma() {
    local found
    found=$(links_are "$1")
    [ "$found" = "$2 rdma up" ] || fail "the links of $1 are: $found"
}

# Nothing is allocated any more, and no appliance answered a request with an error.
nothing_left() {
    [ "$(xpm alloc list --json | tr -d ' \n')" = "[]" ] || fail "allocations are left: $(xpm alloc list)"
    wait_for 20 granted_none
    [ "$(counted errors)" -eq 0 ] || fail "appliances answered errors: $(xpm appliance list --json)"
}

granted_none() {
    xpm appliance list --json | jq -e 'all(.[]; .status.granted == 0)'
}

# The appliances' own count of what they answered.
answered() {
    # The next heartbeat tells it.
    sleep 4
    echo $(($(counted reads) + $(counted writes)))
}

# answered_none_since COUNT: what they answered is as it was.
answered_none_since() {
    [ "$(answered)" -eq "$1" ] || fail "the appliances answered reads or writes: $(xpm appliance list --json)"
}
