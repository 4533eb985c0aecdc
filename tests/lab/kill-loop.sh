# kill-loop.sh ROUNDS: processes that serve swap are killed at random times, under programs that need more memory than the
# guest has and verify what they read back. No page may be bad, no I/O fail, no task hang.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/standby-lib.sh"

rounds=$1
HOG_MB=330

# What can happen to a process, one function each; they take turns.
kill_serving() { kill_blk serving KILL; }
kill_standby() { kill_blk standby KILL; }
stop_serving() { kill_blk serving STOP; }
kill_appliance() { on_host kill "appliance-$((RANDOM % 2 + 1))" "0.$((RANDOM % 9))"; }
kill_allocator() { on_host kill allocator "0.$((RANDOM % 9))"; }
kill_swapd() {
    kill -9 "$swapd_pid"
    note "xpm-swapd, process $swapd_pid: SIGKILL"
    wait "$swapd_pid" 2>/dev/null || true
    start_swapd
}
victims=(kill_serving kill_appliance stop_serving kill_standby kill_swapd kill_serving kill_allocator)

start_swapd() {
    make_group xpm-swapd memory.swap.max=0
    start_daemon swapd in_group "$group" xpm-swapd --config /run/xpm/swapd.toml
    swapd_pid=$pid
    wait_for 60 base_is_on
}

base_is_on() {
    xpm swap status --json | python3 -c '
import json, sys
areas = json.load(sys.stdin)["areas"]
sys.exit(len(areas) != 1 or areas[0]["state"] != "on")'
}

dmesg_start
start_managed_blk
wait_standby
sysctl -qw vm.page-cluster=5
# Its one area is what is always there.
cat >/run/xpm/swapd.toml <<TOML
allocator = "$XPM_ALLOCATOR"
base = "1GiB"
maximum = "1GiB"
TOML
start_swapd
read -r name device <<<"$(xpm swap status --json | python3 -c '
import json, sys
print(*[(area["name"], area["path"]) for area in json.load(sys.stdin)["areas"]][0])')"
note "xpm-swapd has put swap on $device, $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB of memory"
watch_gaps "$device"
before=$(awk '/^pswpout/ {print $2}' /proc/vmstat)
start_hogs $HOG_MB
wait_for 60 has_swapped 30
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
kill "$swapd_pid"
wait "$swapd_pid" || true
take_swap_off "$device"
detach "$name"
stop_managed_blk
dmesg_clean
note "done"
