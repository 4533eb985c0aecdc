# The common part of the scenarios. Sourced by each of them; needs bash.
set -euo pipefail

fail() {
    echo "FAIL: $*" >&2
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
        sleep "${look_every:-0.2}"
    done
}

# load_module NAME...: loads modules, or fails with the name of the one that does not load.
load_module() {
    local module
    for module in "$@"; do
        modprobe "$module" || fail "module $module does not load"
    done
}

# has_module NAME: whether the kernel has it as a module. Linux 7.3 has CRC32 built in, without a module's name.
has_module() { modinfo -n "$1" >/dev/null 2>&1; }

# Daemons of the scenario, the last one first: "PID LOG".
daemons=()

# start_daemon NAME COMMAND...: runs it until the scenario ends, however it ends; $pid is its process.
start_daemon() {
    local log=/run/lab/$LAB_NAME-$1.log
    shift
    "$@" >>"$log" 2>&1 &
    pid=$!
    daemons=("$pid $log" "${daemons[@]}")
}

# After a failure the daemons are left as they are, for the guest ends or has a shell then.
stop_daemons() {
    local status=$? daemon
    trap - EXIT
    if [ $status -ne 0 ]; then
        for daemon in "${daemons[@]}"; do
            echo "--- the end of ${daemon#* }:"
            tail -n 40 "${daemon#* }"
        done
        if [ -e /run/lab/blk.log ]; then
            echo "--- the end of what the lives of xpm-blk said:"
            tail -n 60 /run/lab/blk.log
        fi
        echo "--- swaps:"
        cat /proc/swaps
        exit $status
    fi
    for daemon in "${daemons[@]}"; do
        kill "${daemon%% *}" 2>/dev/null || true
        wait "${daemon%% *}" 2>/dev/null || true
    done
}
trap stop_daemons EXIT

# make_group NAME [FILE=VALUE...]: a cgroup, $group then, whose memory is accounted for, with these settings.
make_group() {
    local setting
    group=/sys/fs/cgroup/$1
    mkdir -p "$group"
    echo +memory >/sys/fs/cgroup/cgroup.subtree_control
    for setting in "${@:2}"; do
        echo "${setting#*=}" >"$group/${setting%%=*}"
    done
}

# in_group GROUP COMMAND...: becomes the command, in that cgroup.
in_group() {
    echo "$BASHPID" >"$1/cgroup.procs"
    shift
    exec "$@"
}

# Settings of an xpm-blk that leaves a guest of 256 MB some memory, with its standby.
small_blk='buffer = "1MiB"
depth = 16
threads = 1
standby-reserve = "8MiB"'

# Starts xpm-blk as its service unit does, in a cgroup that is not swapped. $blk_settings are further lines of its
# configuration. An appliance in an emulated guest takes seconds to register memory.
start_blk() {
    make_group xpm-blk memory.swap.max=0
    mkdir -p /run/xpm /var/lib/xpm-blk
    cat >/run/xpm/blk.toml <<TOML
allocator = "$XPM_ALLOCATOR"
control = "/run/xpm/blk.sock"
state = "/var/lib/xpm-blk"
connect-limit = "60s"
${blk_settings:-}
TOML
    start_daemon blk in_group "$group" xpm-blk --config /run/xpm/blk.toml
    blk_pid=$pid
    wait_for 30 xpm blk list
}

# on_host kill|restart|upgrade NAME [SECONDS]: has the host's daemon NAME (allocator, appliance-1, appliance-2) killed as by
# kill -9, or ended in order, and started again after so many seconds (0); what the appliance holds is kept for it, as
# systemd does. Waits until the next life is ready. Different daemons may be replaced by several processes at once.
on_host() {
    local lives=/run/lab/lives/$2 before
    read -r before <"$lives"
    printf '\n@lab %s %s %s\n' "$1" "$2" "${3:-0}"
    wait_for 120 lives_more "$lives" "$before"
}

lives_more() {
    local now
    read -r now <"$1"
    [ "$now" -gt "$2" ]
}

# attach NAME SIZE FORM [OPTION...]: makes an allocation, with further options of
# `xpm alloc create`, and shows it, over $transport where that is set; $device is its path then.
attach() {
    local name=$1 size=$2 form=$3
    shift 3
    case $form in
    ublk) modprobe ublk_drv ;;
    nbd*) modprobe nbd ;;
    esac
    xpm alloc create "$name" --size "$size" "$@" >/dev/null
    device=$(xpm blk attach "$name" --as "$form" ${transport:+--transport "$transport"} 2>/run/lab/attach.err) ||
        fail "$(cat /run/lab/attach.err)"
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

# take_swap_off DEVICE: swapoff, which the kernel may end for want of memory; not this one.
take_swap_off() {
    (
        echo -1000 >/proc/self/oom_score_adj
        exec swapoff "$1"
    )
}

# swap_off FORM: undoes swap_on.
swap_off() {
    take_swap_off "$device"
    detach "swap-$1"
}

# load FILE MIB FIO-OPTION...: a file or device, written in random order and pieces and verified by fio.
load() {
    local file=$1 mib=$2
    shift 2
    fio --name=load --filename="$file" --size="${mib}M" --rw=randwrite --bsrange=4k-64k --direct=1 \
        --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --randseed=7 --allow_mounted_write=1 \
        --output-format=terse --terse-version=3 "$@" >/run/lab/fio.out 2>&1 || fail "fio: $(tail -n 5 /run/lab/fio.out)"
}

# check_fs TYPE DEVICE: the file system's own check finds nothing to mend.
check_fs() {
    case $1 in
    ext4) e2fsck -f -n "$2" >/run/lab/check.out 2>&1 ;;
    xfs) xfs_repair -n "$2" >/run/lab/check.out 2>&1 ;;
    esac || fail "the check of $1 found: $(tail -n 20 /run/lab/check.out)"
}

# Kernel messages that mean a fault.
dmesg_bad='I/O error|blocked for more than|Read-error|Write-error|BUG:|WARNING:|Oops|rcu.*stall|EXT4-fs (error|warning)|XFS.*(orruption|shut ?down)|Out of memory|oom-kill'

# dmesg_clean checks the kernel's messages from here on.
dmesg_start() {
    dmesg_mark="lab: $LAB_NAME begins, $EPOCHREALTIME"
    echo "$dmesg_mark" >/dev/kmsg
}

dmesg_clean() {
    local log
    log=$(dmesg)
    [[ $log == *"$dmesg_mark"* ]] || fail "the kernel's log is too small to hold all that it said"
    if grep -E "$dmesg_bad" <<<"${log##*"$dmesg_mark"}"; then
        fail "the kernel complained, see above"
    fi
}

# Bytes that granted regions hold at all appliances together.
resident() {
    xpm appliance list --json | jq '[.[].status.resident] | add // 0'
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
