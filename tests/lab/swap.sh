# swap.sh FORM: swap on a device of that form, under a program that needs more memory than the
# guest has.
. "$LAB_SCRIPTS/lib.sh"

form=$1
name=swap-$form
MIB=$((1 << 20))

# Each safety item holds, and the device is set up for swap.
doctor_is_content() {
    xpm doctor
    local bad
    bad=$(xpm doctor --json | jq -r '
        . as $report | [.checks[] | {(.item): .severity}] | add as $found |
        ["mlockall", "io-flusher", "oom-score-adj", "mount-namespace", "cgroup-swap-max", "memory-reserve", "real-time",
            "scheduler", "rotational", "discard", "state", "used by"] |
        map(select($found[.] != "ok")) + if $report.safe then [] else ["safe"] end | join(", ")')
    [ -z "$bad" ] || fail "xpm doctor is not content with: $bad"
}

standby_ready() {
    (xpm status --json || true) | jq -e '.blk.standby.state == "ready"'
}

# locked PID: its locked memory in KiB.
locked() { awk '/^VmLck/ {print $2}' "/proc/$1/status"; }

# The serving process with one ublk device must lock little: the machine has its memory twice, with the standby's. A
# debug build has several times the code.
check_locked() {
    [ "$form" = ublk ] || return 0
    wait_for 120 standby_ready
    local serving standby
    read -r serving standby <<<"$( (xpm status --json || true) | jq -r '.blk | "\(.pid) \(.standby.pid)"')"
    note "locked: $(locked "$serving") KiB by xpm-blk, $(locked "$standby") KiB by its standby"
    cat "/proc/$serving/smaps" >/run/lab/smaps
    [[ $LAB_BIN != */release ]] || [ "$(locked "$serving")" -le $((20 << 10)) ] ||
        fail "that is more than 20 MiB; they are listed in /run/lab/smaps"
}

# How much was swapped out since the guest began, in MiB.
swapped_out() {
    echo $(($(awk '/^pswpout/ {print $2}' /proc/vmstat) * $(getconf PAGESIZE) / MIB))
}

dmesg_start
# xpm-blk keeps a standby where the kernel has ublk's driver, for whatever form of device; no other scenario of this boot
# may have loaded it.
load_module ublk_drv
blk_settings=$small_blk
start_blk
# nbd-direct is for memory that lies on one appliance, so for one region.
set --
[ "$form" != nbd-direct ] || set -- --region-size 1GiB
swap_on "$form" 1GiB "$@"
note "swap on $device"
wait_for 60 resident_at_most $((64 * MIB))
doctor_is_content
check_locked
refused swap xpm blk detach "$name"
refused "swap is on $device" xpm blk check-hibernation
refused 'use|attach|own' xpm alloc delete "$name"
grep -q "^$device " /proc/swaps || fail "a refused detach took the swap away"

# The kernel alone talks to the appliance: the daemon may as well stand still, and its standby, which would take over.
stopped=
if [ "$form" = nbd-direct ]; then
    wait_for 120 standby_ready
    stopped=$(pgrep -x xpm-blk)
    [ "$(wc -w <<<"$stopped")" -eq 2 ] || fail "not two processes of xpm-blk, but $stopped"
    # shellcheck disable=SC2086 # two processes
    kill -STOP $stopped
fi
before=$(swapped_out)
memhog 260 --seed "$RANDOM" --passes 1 --run 64
swapped=$(($(swapped_out) - before))
# shellcheck disable=SC2086 # two processes
[ -z "$stopped" ] || kill -CONT $stopped
note "$swapped MiB were swapped out"
[ $swapped -ge 120 ] || fail "that is too little for a test"

note "the program's swap is given back"
wait_for 60 resident_at_most $((128 * MIB))
swap_off "$form"
xpm blk check-hibernation || fail "hibernation is refused without swap"
[ ! -b "$device" ] || [ "$(blockdev --getsize64 "$device")" -eq 0 ] || fail "$device is still there"
dmesg_clean
note "done"
