# A file system on the kernel's nbd grows and shrinks with its allocation while it is mounted and written.
. "$LAB_SCRIPTS/lib.sh"

# size BYTES: the device shows so many.
size() {
    [ "$(blockdev --getsize64 "$device")" -eq "$1" ] || fail "$device has $(blockdev --getsize64 "$device") bytes, not $1"
}

MIB=$((1 << 20))
dmesg_start
start_blk
attach live 256MiB nbd
modprobe ext4
mkfs.ext4 -q -E nodiscard "$device"
mkdir -p /mnt/live
mount "$device" /mnt/live
# The file is laid out before (--overwrite): resize2fs -M of e2fsprogs 1.47.0 damages files of very many extents, on a
# plain file as well (seen: "invalid extent" after 1 of 6 runs on a loop device).
(load /mnt/live/load 128 --overwrite=1 --time_based --runtime=15) &
load=$!
sleep 2
xpm alloc resize live 512MiB
size $((512 * MIB))
resize2fs "$device" 2>/run/lab/resize.out || fail "$(cat /run/lab/resize.out)"
[ "$(df --output=size -m /mnt/live | tail -n 1)" -gt 400 ] || fail "the file system did not grow"
note "it grew under load"
refused 'in use beyond the new size|Busy|in the way' xpm alloc resize live 128MiB
size $((512 * MIB))
wait $load
umount /mnt/live
# Shrinking wants a check that is later than the last mount, to the second, and written down.
e2fsck -f -p "$device" >/run/lab/check.out 2>&1 || fail "the check of ext4 found: $(cat /run/lab/check.out)"
resize2fs -M "$device" >/run/lab/resize.out 2>&1 || fail "$(cat /run/lab/resize.out)"
blkdiscard -o $((256 * MIB)) -l $((256 * MIB)) "$device"
xpm alloc resize live 256MiB
size $((256 * MIB))
check_fs ext4 "$device"
note "it shrank to what it holds"

# A ublk device keeps its size on this kernel, and says so.
attach still 64MiB ublk
xpm alloc resize still 128MiB 2>/run/lab/resize.out
grep -q 'cannot resize ublk' /run/lab/resize.out || fail "nothing is said of the device: $(cat /run/lab/resize.out)"
size $((64 * MIB))
refused 'cannot become smaller' xpm alloc resize still 64MiB
detach still
detach live
dmesg_clean
note "done"
