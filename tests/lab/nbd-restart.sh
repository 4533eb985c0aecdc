# nbd-restart.sh FORM ROUNDS: a device of the kernel's nbd driver in that form, first with a file system under a load that verifies, then as
# swap under a program that verifies its pages, while xpm-blk and the appliance are killed and restarted. Each xpm-blk must
# take the device over as it is, and no I/O may fail.
. "$LAB_SCRIPTS/lib.sh"

form=$1
rounds=$2
over=/run/over
MIB=$((1 << 20))

# A second request to end, so long after the first, makes xpm-blk end although its devices are in use.
blk_settings='stop-limit = "1s"'

# replace_blk HOW NAME: ends xpm-blk as kill -9 does, or has it end (restart); the next one must show the same device, live.
replace_blk() {
    case $1 in
    kill) kill -9 "$blk_pid" ;;
    restart)
        while kill -TERM "$blk_pid" 2>/dev/null; do
            sleep 1.5
        done
        ;;
    esac
    wait "$blk_pid" 2>/dev/null || true
    sleep "0.$((RANDOM % 10))"
    start_blk
    wait_for 30 is_live "$2"
}

is_live() {
    local found
    found=$(xpm blk show "$1" --json | jq -r '"\(.state) \(.path)"')
    echo "$1: $found"
    [ "$found" = "live $device" ]
}

# replace_all NAME PID: xpm-blk and the appliance, in rounds, while the process goes on.
replace_all() {
    local round
    for ((round = 1; round <= rounds; round++)); do
        for way in kill restart; do
            kill -0 "$2" 2>/dev/null || fail "the load ended too early: $(cat /run/lab/load.out)"
            replace_blk $way "$1"
            sleep 2
            on_host $way "$held" "0.$((RANDOM % 9))"
            sleep 2
            wait_for 30 is_live "$1"
        done
    done
}

# Where an allocation of one region lies.
place() {
    xpm alloc show "$1" --json | jq -r '.regions[0].appliance_name'
}

# The load and, when all has been replaced, its end.
verified_load() {
    until [ -e $over ]; do
        load /mnt/fs/load 32 --do_verify=1 --randseed=$RANDOM
    done
}

rm -f $over
modprobe ext4
# As systemd has it: what is unmounted here is so for an xpm-blk, too, that was started when it was mounted.
mount --make-rshared /
dmesg_start
start_blk
attach "$form" 128MiB "$form" --region-size 128MiB
held=$(place "$form")
mkdir -p /mnt/fs
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$device"
mount "$device" /mnt/fs
verified_load >/run/lab/load.out 2>&1 &
loader=$!
replace_all "$form" $loader
: >$over
wait $loader || fail "the load: $(cat /run/lab/load.out)"
note "$device: $((rounds * 2)) lives of xpm-blk and of the appliance under a verified load"
umount /mnt/fs
check_fs ext4 "$device"
detach "$form"

rm -f $over
swap_on "$form" 512MiB --region-size 512MiB
held=$(place "swap-$form")
make_group hog memory.max=$((64 * MIB))
in_group "$group" memhog 160 --seed "$RANDOM" --until $over --run 64 >/run/lab/load.out 2>&1 &
hog=$!
sleep 5
replace_all "swap-$form" $hog
swapped=$(awk -v device="$device" '$1 == device {print int($4 / 1024)}' /proc/swaps)
: >$over
wait $hog || fail "memhog: $(cat /run/lab/load.out)"
tail -n 1 /run/lab/load.out
[ "$swapped" -ge 80 ] || fail "$swapped MiB were swapped out, too little for a test"
note "$device: the same under $swapped MiB of swap"
swap_off "$form"

# One that no record speaks of is left while somebody has it, and said; and taken away when nobody uses it.
attach orphan 64MiB "$form" --region-size 64MiB
# shellcheck disable=SC2217 # The open descriptor uses the device.
sleep infinity <"$device" &
holder=$!
kill -9 "$blk_pid"
wait "$blk_pid" 2>/dev/null || true
rm /var/lib/xpm-blk/devices/orphan.json
start_blk
[ -n "$(cat "/sys/block/${device#/dev/}/pid" 2>/dev/null)" ] || fail "a device in use was taken away"
grep -q "$device was left by an earlier xpm-blk" "/run/lab/$LAB_NAME-blk.log" || fail "nothing is said of it"
kill -9 "$blk_pid" $holder
wait "$blk_pid" $holder 2>/dev/null || true
start_blk
wait_for 10 test ! -e "/sys/block/${device#/dev/}/pid"
device=$(xpm blk attach orphan --as "$form")
detach orphan
note "a device that no record speaks of: left while it is in use, then taken away, and attached anew"
dmesg_clean
note "done"
