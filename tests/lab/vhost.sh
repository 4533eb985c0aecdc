# The guest's disk is a vhost-user-blk device that an xpm-blk on the host serves: ext4 and swap on it, while that xpm-blk is
# killed again and again. No I/O may fail, and no byte be wrong.
. "$LAB_SCRIPTS/lib.sh"

MIB=$((1 << 20))

# Has the host kill its xpm-blk every few seconds, until stop_killing.
start_killing() {
    while sleep 2; do
        printf '\n@lab kill-blk\n'
    done &
    killer=$!
}

stop_killing() {
    kill "$killer"
    wait "$killer" 2>/dev/null || true
}

# The disk whose serial number is the allocation's name.
find_disk() {
    local serial
    for serial in /sys/block/vd*/serial; do
        [ "$(cat "$serial")" != vm ] || device=/dev/$(basename "$(dirname "$serial")")
    done
    [ -b "${device:-}" ]
}

modprobe virtio_blk
modprobe ext4
find_disk || fail "no disk has the allocation's name"
queue=/sys/block/${device#/dev/}/queue
[ "$(blockdev --getsize64 "$device")" -eq $((1 << 30)) ] || fail "$device has another size than its allocation"
[ "$(find "${queue%/queue}/mq" -mindepth 1 -maxdepth 1 | wc -l)" -eq 2 ] || fail "$device has not a queue for each processor"
[ "$(cat "$queue/physical_block_size")" -eq 4096 ] || fail "$device does not say that its blocks are pages"
[ "$(cat "$queue/discard_max_bytes")" -gt 0 ] || fail "$device takes no discards"
[ "$(cat "$queue/write_zeroes_max_bytes")" -gt 0 ] || fail "$device takes no zeroing"
dmesg_start

mkdir -p /mnt/fs
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$device"
mount "$device" /mnt/fs
fstrim /mnt/fs
start_killing
load /mnt/fs/load 64 --do_verify=1 --loops=3
stop_killing
note "ext4: 64 MiB written and verified under kill -9"
umount /mnt/fs
check_fs ext4 "$device"
mount "$device" /mnt/fs
load /mnt/fs/load 64 --verify_only=1
rm /mnt/fs/load
umount /mnt/fs
check_fs ext4 "$device"
note "ext4: verified once more through a new mount"

sysctl -qw vm.page-cluster=5
mkswap "$device" >/dev/null
swapon --discard "$device"
before=$(awk '/^pswpout/ {print $2}' /proc/vmstat)
start_killing
memhog 360 --seed "$RANDOM" --passes 1 --run 64
stop_killing
swapped=$((($(awk '/^pswpout/ {print $2}' /proc/vmstat) - before) * $(getconf PAGESIZE) / MIB))
note "swap: $swapped MiB were swapped out under kill -9"
[ $swapped -ge 120 ] || fail "that is too little for a test"
swapoff "$device"

has_mib() {
    [ "$(blockdev --getsize64 "$device")" -eq $(($1 * MIB)) ]
}

# The guest is told of a new size, also by an xpm-blk that it was not started with.
xpm alloc resize vm 1280MiB >/dev/null
wait_for 20 has_mib 1280
dd if=/dev/urandom of="$device" bs=1M seek=1270 count=10 oflag=direct status=none
blkdiscard -f "$device"
xpm alloc resize vm 768MiB >/dev/null
wait_for 20 has_mib 768
note "resized to 1280 and 768 MiB while it was there"
dmesg_clean
note "done"
