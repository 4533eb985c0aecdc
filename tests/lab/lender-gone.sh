# lender-gone.sh FORM: swap of that form on an appliance that goes for good in the midst of use. Given up, the machine goes on.
. "$LAB_SCRIPTS/lib.sh"

form=$1
name=swap-$form

# of COMMAND FILTER: jq's filter on the JSON that a command of `xpm` prints.
of() {
    # shellcheck disable=SC2086
    xpm $1 --json | jq -r "$2"
}

says() {
    local found
    found=$(of "$1" "$2")
    echo "$1: $2 is $found"
    [ "$found" = true ]
}

swapped_at_least() {
    local kib
    kib=$(awk -v device="$device" '$1 == device {print $4}' /proc/swaps)
    echo "$kib KiB are swapped out; $(cat /run/lab/hog.out)"
    [ "${kib:-0}" -ge "$1" ]
}

is_over() {
    ! kill -0 "$1" 2>/dev/null
}

# A standby locks as much memory as the process that serves: by default, both together more than the guest has.
blk_settings=$small_blk
start_blk
swap_on "$form" 256MiB --region-size 256MiB
lender=$(of "alloc show $name" '.regions[0].appliance_name')
note "swap on $device, whose memory is on $lender"
# Only this program's memory is swapped out. The kernel may end it, as any program, when nothing of it can be swapped out.
make_group hog memory.max=48M
(
    echo 0 >/proc/self/oom_score_adj
    in_group "$group" memhog 128 --seed 7 --passes 1000 --run 64
) >/run/lab/hog.out 2>&1 &
hog=$!
wait_for 120 swapped_at_least 40000
# The client reports what uses a device every 10 s; that is what the commands below name.
wait_for 60 says "alloc show $name" '(.used.users // []) | index("swap") != null'

printf '\n@lab freeze %s\n' "$lender"
wait_for 60 says "appliance show $lender" '.state == "silent"'
wait_for 60 says "blk show $name" '.in_flight > 0'
note "$lender is silent, and I/O waits"
refused "xpm appliance forget $lender --lost" xpm appliance forget "$lender"
refused "xpm appliance forget $lender --lost" xpm alloc delete "$name"
refused "swap" xpm blk detach "$name"
refused "$name.*swap.*--yes" bash -c "xpm appliance forget $lender --lost </dev/null 2>&1 | tr '\n' ' '; exit 1"

began=$(cut -d' ' -f1 /proc/uptime)
xpm appliance forget "$lender" --lost --yes | tee /run/lab/forget.out
grep -q "run .swapoff $device. on lab" /run/lab/forget.out || fail "nothing is said of swap"
# swapoff charges what it reads to the cgroup of the pages' owner, and ends with ENOMEM (status 2, swapoff(8)) when that cgroup
# is full and its program is not gone yet.
echo max >"$group/memory.max"
take_swap_off "$device"
note "given up, and swapoff is through $(awk -v began="$began" '{print $1 - began}' /proc/uptime) s later"
wait_for 20 is_over "$hog"
wait "$hog" && fail "the program ended well, without its memory: $(cat /run/lab/hog.out)"
wait_for 10 says "blk show $name" '.in_flight == 0 and .state == "lost"'
xpm blk list | grep "lost on $lender" || fail "the list does not say so"
xpm alloc list | grep "lost on $lender" || fail "the list of allocations does not say so"
detach "$name"
[ ! -b "$device" ] || [ "$(blockdev --getsize64 "$device")" -eq 0 ] || fail "$device is still there"

# The machine is usable: swap on the other one, and a program on that.
swap_on "$form" 256MiB --region-size 256MiB
(in_group "$group" memhog 96 --seed 9 --passes 1 --run 64)
swap_off "$form"
note "swap on the other appliance did its work"

printf '\n@lab thaw %s\n' "$lender"
wait_for 60 says "appliance show $lender" '.state == "up" and .status.granted == 0'
note "$lender is back, cleared"
