# A pool that begins with the programs of an earlier commit is upgraded under live swap and a mounted file system: each
# daemon becomes today's program, one after the other, in an order drawn by chance. Between two steps old and new daemons
# work together; no byte may be wrong, no request fail, and each order of the operator must be carried out.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/standby-lib.sh"

[ -x "$LAB_EARLIER_BIN/xpm-blk" ] || fail "no programs of an earlier commit"
blk_program=$LAB_EARLIER_BIN/xpm-blk
swapd_program=$LAB_EARLIER_BIN/xpm-swapd

# The output of the operator's program must hold for both: old `xpm` with new daemons, and new `xpm` with old ones.
each_xpm() {
    local command
    for command in "$LAB_EARLIER_BIN/xpm" "$LAB_BIN/xpm"; do
        "$command" "$@" >/run/lab/xpm.out 2>&1 || fail "$command $*: $(cat /run/lab/xpm.out)"
    done
}

# work NAME: an allocation is made, used, resized and deleted, while the pool is what it is.
work() {
    local size
    xpm alloc create "$1" --size 64MiB --stripe 2 >/dev/null
    device=$(xpm blk attach "$1" --as ublk)
    load "$device" 16 --do_verify=1
    xpm alloc resize "$1" 128MiB >/dev/null
    size=$(xpm alloc list --json | jq --arg name "$1" '.[] | select(.name == $name).size')
    [ "$size" = $((128 << 20)) ] || fail "$1 has $size bytes after it was resized"
    detach "$1"
}

upgrade_blk() {
    blk_program=$LAB_BIN/xpm-blk
    echo "$blk_program" >"$blk_program_file"
    replace_blk
    # The manager starts today's program from now on, and that takes over in its turn.
    [ "$(readlink /proc/"$serving"/exe)" = "$(readlink -f "$blk_program")" ] ||
        fail "process $serving, which serves, is $(readlink /proc/"$serving"/exe)"
}

upgrade_swapd() {
    end_swapd TERM
    swapd_program=$LAB_BIN/xpm-swapd
    start_swapd
}

mount --make-rshared /
dmesg_start
echo "$blk_program" >"$blk_program_file"
start_managed_blk
wait_standby
modprobe ext4
attach fs 512MiB ublk --stripe 2
fs=$device
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$fs"
mkdir -p /mnt/fs
mount "$fs" /mnt/fs
swapd_swap_on
swap=$device
before=$(awk '/^pswpout/ {print $2}' /proc/vmstat)
start_hogs 420
load /mnt/fs/load 64 --do_verify=1 --loops=3 &
fio=$!
# Filling the memory of an emulated guest on a busy host takes minutes.
wait_for 300 has_swapped 30

order=$(printf '%s\n' allocator appliance-1 appliance-2 blk swapd | shuf | tr '\n' ' ')
note "the order: $order"
step=0
for daemon in $order; do
    case $daemon in
    blk) upgrade_blk ;;
    swapd) upgrade_swapd ;;
    *) on_host upgrade "$daemon" "0.$((RANDOM % 9))" ;;
    esac
    hogs_live
    step=$((step + 1))
    look_every=1 wait_for 60 each_xpm appliance list
    each_xpm alloc list
    each_xpm blk list
    work "work-$step"
    note "$daemon is today's program"
done
wait $fio || fail "fio: $(tail -n 5 /run/lab/fio.out)"
end_hogs
umount /mnt/fs
check_fs ext4 "$fs"
mount "$fs" /mnt/fs
load /mnt/fs/load 64 --verify_only=1
umount /mnt/fs
no_errors fs
no_errors "$name"
end_swapd TERM
take_swap_off "$swap"
detach "$name"
detach fs
stop_managed_blk
dmesg_clean
note "$passes passes of the program found 0 bad pages; done"
