# What the scenarios share. Sourced by each of them; needs bash.
set -euo pipefail

fail() {
    echo "FAIL: $*"
    exit 1
}

# A line of the account, with the guest's uptime in seconds.
note() {
    printf '%5.1f  %s\n' "$(cut -d' ' -f1 /proc/uptime)" "$*"
}

# refused TEXT COMMAND...: the command must fail, and say TEXT (a regular expression) when it does.
refused() {
    local text=$1 out
    shift
    if out=$("$@" 2>&1); then
        fail "not refused: $*"
    fi
    grep -qiE "$text" <<<"$out" || fail "refused for another reason than /$text/: $* said: $out"
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local deadline=$((SECONDS + $1)) out
    shift
    until out=$("$@" 2>&1); do
        [ $SECONDS -lt $deadline ] || fail "still not so: $*: $out"
        sleep 0.2
    done
}

# Starts xpm-blk as its service unit does, in a cgroup that is not swapped, and stops it when the
# scenario ends, however it ends.
start_blk() {
    local group=/sys/fs/cgroup/xpm-blk
    mkdir -p /run/xpm /var/lib/xpm-blk $group
    echo +memory >/sys/fs/cgroup/cgroup.subtree_control
    echo 0 >$group/memory.swap.max
    cat >/run/xpm/blk.toml <<TOML
allocator = "$XPM_ALLOCATOR"
control = "/run/xpm/blk.sock"
state = "/var/lib/xpm-blk"
TOML
    (
        echo "$BASHPID" >$group/cgroup.procs
        exec xpm-blk --config /run/xpm/blk.toml
    ) >"/run/lab/$LAB_NAME.log" 2>&1 &
    blk_pid=$!
    trap stop_blk EXIT
    wait_for 30 xpm blk list
}

stop_blk() {
    local status=$?
    trap - EXIT
    if [ $status -ne 0 ]; then
        echo "--- the end of xpm-blk's log:"
        tail -n 40 "/run/lab/$LAB_NAME.log"
        echo "--- swaps:"
        cat /proc/swaps
    fi
    kill "$blk_pid" 2>/dev/null || true
    wait "$blk_pid" 2>/dev/null || true
    exit $status
}

# attach NAME SIZE FORM [OPTION...]: makes an allocation, with further options of
# `xpm alloc create`, and shows it; $device is its path then.
attach() {
    local name=$1 size=$2 form=$3
    shift 3
    case $form in
    ublk) modprobe ublk_drv ;;
    nbd*) modprobe nbd ;;
    esac
    xpm alloc create "$name" --size "$size" "$@" >/dev/null
    device=$(xpm blk attach "$name" --as "$form" 2>/run/lab/attach.err) || fail "$(cat /run/lab/attach.err)"
    [ -b "$device" ] || fail "attach printed no block device: $device"
    local bytes
    bytes=$(blockdev --getsize64 "$device")
    [ "$bytes" -eq "$(numfmt --from=auto "${size%B}")" ] || fail "$device has $bytes bytes, not $size"
}

# detach NAME: removes the device and the allocation.
detach() {
    xpm blk detach "$1"
    xpm alloc delete "$1"
}

# swap_on FORM SIZE [OPTION...]: an allocation swap-FORM as swap with discard; $device is its path
# then. Pages are read in runs of 32: in an emulated guest each request takes milliseconds.
swap_on() {
    sysctl -qw vm.page-cluster=5
    attach "swap-$1" "$2" "$1" "${@:3}"
    mkswap "$device" >/dev/null
    swapon --discard "$device"
}

# swap_off FORM: undoes swap_on. The kernel may end swapoff for want of memory; not this one.
swap_off() {
    (
        echo -1000 >/proc/self/oom_score_adj
        exec swapoff "$device"
    )
    detach "swap-$1"
}

# What the kernel says from here on is looked at by dmesg_clean.
dmesg_start() {
    dmesg_lines=$(dmesg | wc -l)
}

dmesg_clean() {
    local bad='I/O error|blocked for more than|Read-error|Write-error|BUG:|WARNING:|Oops|rcu.*stall|EXT4-fs (error|warning)|XFS.*(orruption|shut ?down)|Out of memory|oom-kill'
    if dmesg | tail -n +$((dmesg_lines + 1)) | grep -E "$bad"; then
        fail "the kernel complained, see above"
    fi
}

# Bytes that granted regions hold at all appliances together.
resident() {
    xpm appliance list --json | python3 -c '
import json, sys
print(sum(appliance["status"]["resident"] for appliance in json.load(sys.stdin)))'
}

# resident_at_most BYTES: whether no more is held. The allocator learns it with the heartbeats.
resident_at_most() {
    local now
    now=$(resident)
    echo "$now bytes are resident, $1 wanted"
    [ "$now" -le "$1" ]
}

resident_at_least() {
    local now
    now=$(resident)
    echo "$now bytes are resident, $1 wanted"
    [ "$now" -ge "$1" ]
}
