# swapd.sh [KILLS]: xpm-swapd follows a program that needs three times the guest's memory up and down; areas are
# drained under it; what is refused is told; what others made is left; and it is killed in the middle of growing.
. "$LAB_SCRIPTS/lib.sh"

kills=${1:-3}
MIB=$((1 << 20))

# status FILTER: jq's filter on the status, whatever the exit status of the command is. $on are the areas that are on, $size
# is their size in MiB, and $trouble the reasons of troubles by name.
status() {
    (xpm swap status --json || true) | jq -nr 'input | [.areas[] | select(.state == "on")] as $on |
        (([$on[].size] | add // 0) / 1048576 | floor) as $size |
        ([.troubles[] | {(.what): .why}] | add // {}) as $trouble | '"$1"
}

# is FILTER: whether it is true.
is() {
    local now
    now=$(status "$1")
    [ "$now" = true ] && return
    status .
    return 1
}

start_swapd() {
    make_group xpm-swapd memory.swap.max=0
    start_daemon swapd in_group "$group" xpm-swapd --config /run/xpm/swapd.toml
    swapd_pid=$pid
    wait_for 30 status true
}

# Areas, devices, allocations and swap are the same, each once.
all_agree() {
    local areas devices allocations swaps
    areas=$(status '[.areas[].name] | sort | join(" ")')
    devices=$(xpm blk list --json | jq -r '[.[].name | select(startswith("swap-"))] | sort | join(" ")')
    allocations=$(xpm alloc list --json | jq -r '[.[] | select(.labels // {} | has("xpm-swapd")).name] | sort | join(" ")')
    swaps=$(status '$on | length')
    echo "areas: $areas; devices: $devices; allocations: $allocations; on: $swaps"
    [ "$areas" = "$devices" ] && [ "$areas" = "$allocations" ] && [ "$(wc -w <<<"$areas")" -eq "$swaps" ]
}

# Takes away what was asked for by hand.
drop_by_hand() {
    local areas
    areas=$(status '[$on[] | select(.origin == "hand").name] | join(" ")')
    # shellcheck disable=SC2086
    [ -z "$areas" ] || xpm swap drain $areas >/dev/null
}

limit() {
    printf '[[account]]\nname = "swap"\nhard-limit = "%s"\n' "$1" >/run/lab/account.toml
    xpm apply /run/lab/account.toml >/dev/null
}

dmesg_start
# Many devices on a small machine: less memory for the buffers of each.
blk_settings='buffer = "2MiB"
depth = 32
queues = 1'
start_blk
modprobe ublk_drv
modprobe ext4
# A program may ask for more than is there now.
sysctl -qw vm.overcommit_memory=1

# Things made by others: swap of lower priority, and a name that xpm-swapd would have taken.
attach others 64MiB ublk
others=$device
mkswap -L others "$others" >/dev/null
swapon --priority 5 "$others"
xpm alloc create "swap-$(uname -n)-2" --size 16MiB >/dev/null
attach disk 64MiB ublk
mkfs.ext4 -q "$device"
mkdir -p /mnt/disk
mount "$device" /mnt/disk
make_group lab-protected
protected=$group

limit 8GiB
cat >/run/xpm/swapd.toml <<TOML
allocator = "$XPM_ALLOCATOR"
base = "256MiB"
maximum = "1536MiB"
look = "200ms"
protect = ["lab-protected"]
[grow]
free-below = "128MiB"
step = "128MiB"
step-max = "512MiB"
[shrink]
after = "10s"
[device]
account = "swap"
[fallback]
path = "/mnt/disk/swap"
priority = 1
size = "32MiB"
[tune]
mode = "set"
page-cluster = 5
TOML
before=$(cat /proc/sys/vm/page-cluster)
start_swapd
wait_for 20 is '$size == 256 and .fallback.on'
note "the base is on: $(status '[$on[].path] | join(" ")'), and the last resort"
is 'all(.safety[]; .ok) and .pressure.told' || fail "it is not fit"
[ "$(cat "$protected/memory.swap.max")" = 0 ] || fail "the control group is not protected"
[ "$(cat /proc/sys/vm/page-cluster)" = 5 ] || fail "page-cluster is not set"
xpm swap status >/run/lab/status.out || fail "there is a trouble: $(cat /run/lab/status.out)"

# Up: three times the memory of the machine.
total=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
memhog $((3 * total)) --seed "$RANDOM" --passes 1 --run 64 >/run/lab/hog.out 2>&1 &
hog=$!
until grep -q filled /run/lab/hog.out; do
    kill -0 $hog 2>/dev/null || fail "memhog ended: $(cat /run/lab/hog.out)"
    sleep 0.2
done
note "$((3 * total)) MiB are filled, with $(status '$size') MiB of swap in $(status '$on | length') areas"
[ "$(status '$size')" -ge $((2 * total)) ] || fail "it did not follow"

# Drained under use: told to stay at first, then wholly.
victim=$(status '[$on[] | select(.origin == "step")] | min_by(.size).name')
xpm swap drain "$victim" --no-wait >/dev/null
xpm swap drain --stop
# The kernel looks for signals between two processes only, so it may go on for as long as the whole takes.
wait_for 300 is 'all(.areas[]; .leaving | not)'
note "told to stay, $victim is still on: $(status "any(\$on[]; .name == \"$victim\")")"
victim=$(status '[$on[] | select(.origin == "step")] | min_by(.size).name')
used=$(status "\$on[] | select(.name == \"$victim\").used / 1048576 | floor")
xpm swap drain "$victim" 2>/run/lab/drain.err || fail "$(cat /run/lab/drain.err)"
kill -0 $hog || fail "the program ended before it was drained"
note "$victim was drained of $used MiB under use, after it was told to stay once"
wait $hog || fail "memhog: $(cat /run/lab/hog.out)"
tail -n 1 /run/lab/hog.out

# Down again, to the base, without anybody's doing.
wait_for 90 is '$size == 256 and (.areas | length) == ($on | length)'
note "down again: $(status '$size') MiB"
wait_for 10 all_agree

# Killed in the middle of growing, again and again.
for ((round = 1; round <= kills; round++)); do
    swaps=$(grep -c ublk /proc/swaps)
    size=$(status '$size')
    xpm swap grow 64MiB >/dev/null 2>&1 &
    asked=$!
    until grep -q making /var/lib/xpm-swapd/state.json; do
        kill -0 $asked 2>/dev/null || break
    done
    sleep "0.$((RANDOM % 3))$((RANDOM % 10))"
    kill -9 "$swapd_pid"
    wait "$swapd_pid" 2>/dev/null || true
    wait $asked || true
    left=$(grep -c ublk /proc/swaps)
    [ "$left" -ge "$swaps" ] || fail "its end took swap away"
    grep ublk /proc/swaps >/run/lab/swaps.before || true
    start_swapd
    wait_for 30 is '($on | length) == (.areas | length)'
    wait_for 10 all_agree
    [ "$(status '$size')" -le $((size + 64)) ] || fail "an area was made twice"
    while read -r path _; do
        grep -q "^$path " /proc/swaps || fail "$path was on before xpm-swapd was started again"
    done </run/lab/swaps.before
    [ $((round % 4)) -ne 0 ] || drop_by_hand
done
note "killed $kills times while growing: $(status '[$on[] | .name + " " + .path] | join(", ")')"
drop_by_hand

# Refused: by the account's limit, told, and mended when there is more.
limit 256MiB
refused 'hard.limit|limit' xpm swap grow 64MiB
memhog 420 --seed 1 --passes 4 --run 64 >/run/lab/hog.out 2>&1 &
hog=$!
wait_for 120 is '$trouble.grow // "" | contains("limit")'
refused 'SWAP_NOT_GROWN' xpm swap status
note "the refusal is told: $(status '$trouble.grow')"
limit 8GiB
wait_for 60 is '$size > 256 and ($trouble | has("grow") | not)'
wait $hog || fail "memhog: $(cat /run/lab/hog.out)"
note "and it grew when there was more"
wait_for 60 is '$size == 256'

# Refused: the pool is full.
xpm alloc create filler --region-size 16MiB --size "$(xpm appliance list --json | jq '([.[].status.free] | add) - 33554432')" >/dev/null
refused 'do not fit|no room|not enough' xpm swap grow 1GiB
xpm alloc delete filler

# Everything of it goes; what is not its own stays, and settings are put back with the end of the wish.
xpm swap drain --all
grep -q "^$others " /proc/swaps || fail "the swap of others is gone"
[ "$(blkid -s LABEL -o value "$others")" = others ] || fail "the swap of others was written to"
[ "$(status 'has("rest") and ($on | length) == 0')" = true ] || fail "it makes swap although it rests: $(status .)"
kill "$swapd_pid"
wait "$swapd_pid" || true
grep -q '/mnt/disk/swap' /proc/swaps || fail "its end took the last resort away"
sed -i 's/mode = "set"/mode = "off"/' /run/xpm/swapd.toml
start_swapd
wait_for 10 grep -qx "$before" /proc/sys/vm/page-cluster
wait_for 20 is '.areas | length == 0'
kill "$swapd_pid"
wait "$swapd_pid" || true

swapoff /mnt/disk/swap "$others"
umount /mnt/disk
detach disk
detach others
xpm alloc delete "swap-$(uname -n)-2"
dmesg_clean
note "done"
