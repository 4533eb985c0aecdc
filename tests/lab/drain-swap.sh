# The appliance that holds active swap is emptied, and then the next one, under a program that needs more
# memory than the guest has and verifies every page.
. "$LAB_SCRIPTS/lib.sh"

# Names of the appliances that an allocation lies on.
places() {
    xpm alloc show "$1" --json | jq -r '[.regions[].appliance_name] | unique | join(" ")'
}

dmesg_start
blk_settings=$small_blk
start_blk
rm -f /run/lab/drained
swap_on ublk 640MiB
note "swap on $device, on $(places swap-ublk)"
memhog 300 --seed "$RANDOM" --until /run/lab/drained --run 64 >/run/lab/hog.out 2>&1 &
hog=$!
sleep 8
for round in 1 2; do
    # The first of those that hold it; the second round empties the one that took it.
    from=$(places swap-ublk | cut -d' ' -f1)
    kill -0 $hog || fail "the program ended before the move: $(cat /run/lab/hog.out)"
    xpm appliance drain "$from"
    note "round $round: $from is empty; swap is on $(places swap-ublk)"
    [[ " $(places swap-ublk) " != *" $from "* ]] || fail "$from still has swap"
    grep -q "^$device " /proc/swaps || fail "the swap is gone"
    xpm appliance undrain "$from"
done
: >/run/lab/drained
wait $hog || fail "memhog: $(cat /run/lab/hog.out)"
tail -n 2 /run/lab/hog.out
xpm blk show swap-ublk --json | jq -e '.counters.errors == 0 and .state == "live"' >/dev/null ||
    fail "I/O failed: $(xpm blk show swap-ublk --json)"
swap_off ublk
dmesg_clean
note "done"
