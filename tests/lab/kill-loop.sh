# kill-loop.sh ROUNDS: processes that serve swap are killed at random times, under programs that need more memory than the
# guest has and verify what they read back. No page may be bad, no I/O fail, no task hang.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/standby-lib.sh"

rounds=$1
HOG_MB=330

# What can happen to a process, one function each; they take turns. A process of another name is added by its function.
kill_serving() { kill_blk serving KILL; }
kill_standby() { kill_blk standby KILL; }
stop_serving() { kill_blk serving STOP; }
victims=(kill_serving kill_standby kill_serving stop_serving)

dmesg_start
start_managed_blk
wait_standby
swap_on ublk 1GiB
note "swap on $device, $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB of memory"
watch_gaps "$device"
before=$(awk '/^pswpout/ {print $2}' /proc/vmstat)
start_hogs $HOG_MB
wait_for 60 has_swapped 30
for ((round = 1; round <= rounds; round++)); do
    read -rt "$((RANDOM % 3)).$((RANDOM % 1000))" _ <>"$never" || true
    "${victims[(round - 1) % ${#victims[@]}]}"
    hogs_live
    wait_standby
done
end_hogs
end_gaps
swapped=$((($(awk '/^pswpout/ {print $2}' /proc/vmstat) - before) / 256))
note "$rounds kills: $passes passes over $HOG_MB MB found 0 bad pages; $swapped MiB were swapped out"
[ $swapped -ge 150 ] || fail "that is too little for a test"
note "$(cat /run/lab/gaps.log)"
no_errors swap-ublk
swap_off ublk
stop_managed_blk
dmesg_clean
note "done"
