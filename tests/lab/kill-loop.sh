# kill-loop.sh ROUNDS: processes that serve swap are killed at random times, under programs that need more memory than the
# guest has and verify what they read back. No page may be bad, no I/O fail, no task hang.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/standby-lib.sh"

rounds=$1
HOG_MB=330

# Events that can happen to a process, one function each; they take turns.
kill_serving() { kill_blk serving KILL; }
kill_standby() { kill_blk standby KILL; }
stop_serving() { kill_blk serving STOP; }
kill_appliance() { on_host kill "appliance-$((RANDOM % 2 + 1))" "0.$((RANDOM % 9))"; }
kill_allocator() { on_host kill allocator "0.$((RANDOM % 9))"; }
kill_swapd() {
    end_swapd KILL
    start_swapd
}
victims=(kill_serving kill_appliance stop_serving kill_standby kill_swapd kill_serving kill_allocator)

dmesg_start
start_managed_blk
wait_standby
swapd_swap_on
watch_gaps "$device"
before=$(awk '/^pswpout/ {print $2}' /proc/vmstat)
start_hogs $HOG_MB
# Filling the memory of an emulated guest on a busy host takes minutes.
wait_for 300 has_swapped 30
for ((round = 1; round <= rounds; round++)); do
    sleep "$((RANDOM % 3)).$((RANDOM % 1000))"
    "${victims[(round - 1) % ${#victims[@]}]}"
    hogs_live
    wait_standby
    wait_for 60 base_is_on
done
end_hogs
end_gaps
swapped=$((($(awk '/^pswpout/ {print $2}' /proc/vmstat) - before) / 256))
note "$rounds kills: $passes passes over $HOG_MB MB found 0 bad pages; $swapped MiB were swapped out"
[ $swapped -ge 150 ] || fail "that is too little for a test"
note "$(cat /run/lab/gaps.log)"
no_errors "$name"
end_swapd TERM
take_swap_off "$device"
detach "$name"
stop_managed_blk
dmesg_clean
note "done"
