# appliance-restart.sh FORM ROUNDS: swap on a device of that form, under a program that needs more than the memory of the guest
# and verifies its pages until all is over, while the appliances that hold the swap, and the allocator, are killed and
# restarted. No page may be lost, and no I/O fail.
. "$LAB_SCRIPTS/lib.sh"

form=$1
rounds=$2
name=swap-$form
MIB=$((1 << 20))
over=/run/over
hog_out=/run/lab/hog.out

# The used part of the swap device, in MiB.
swapped() {
    awk -v device="$device" '$1 == device {print int($4 / 1024)}' /proc/swaps
}

swapped_at_least() {
    echo "$(swapped) MiB are swapped out, $1 wanted; $(cat $hog_out)"
    [ "$(swapped)" -ge "$1" ]
}

# Appliances that the allocation lies on.
places() {
    xpm alloc show "$name" --json | jq -r '[.regions[].appliance_name] | unique | join(" ")'
}

# device_says FILTER: jq's filter on the state that xpm-blk reports of the device.
device_says() {
    xpm blk show "$name" --json | jq -r "$1"
}

# replace HOW NAME: and a moment in which the load goes on.
replace() {
    kill -0 $hog 2>/dev/null || fail "the program ended before the end: $(cat $hog_out)"
    on_host "$1" "$2" "0.$((RANDOM % 9))"
    sleep "$((1 + RANDOM % 2)).$((RANDOM % 10))"
}

rm -f $over
dmesg_start
start_blk
case $form in
nbd-direct) swap_on "$form" 512MiB --region-size 512MiB ;;
*) swap_on "$form" 512MiB --stripe 2 --region-size 128MiB ;;
esac
held=$(places)
memhog 300 --seed "$RANDOM" --until $over --run 64 >$hog_out 2>&1 &
hog=$!
wait_for 120 swapped_at_least 200
note "swap on $device, on $held; $(swapped) MiB are swapped out"
for ((round = 1; round <= rounds; round++)); do
    for appliance in $held; do
        replace kill "$appliance"
        replace restart "$appliance"
    done
    if ((round % 2)); then replace kill allocator; else replace restart allocator; fi
    note "round $round of $rounds: $(swapped) MiB are swapped out, links were made anew" \
        "$(device_says '[.links[].reconnects] | add') times"
done
: >$over
wait $hog || fail "memhog: $(cat $hog_out)"
tail -n 1 $hog_out
[ "$(device_says '.counters.errors // 0')" -eq 0 ] || fail "I/O failed: $(xpm blk show "$name" --json)"
[ "$(device_says '.state')" = live ] || fail "not live: $(xpm blk show "$name" --json)"
replaced=$(wc -w <<<"$held")
replaced=$((replaced * rounds * 2))
[ "$(device_says '[.links[].reconnects] | add')" -ge $replaced ] ||
    fail "links saw less than $replaced lives: $(xpm blk show "$name" --json)"
wait_for 20 xpm fsck
swap_off "$form"
dmesg_clean
note "done"
