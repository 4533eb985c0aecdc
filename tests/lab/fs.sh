# File systems on devices: verified load, trim that gives memory back, clean checks. The forms of one allocation have
# one block size, and the driver of ublk may be loaded after xpm-blk has started.
. "$LAB_SCRIPTS/lib.sh"

MIB=$((1 << 20))
FILE_MIB=32

# use_fs TYPE: makes a file system on $device, uses and checks it.
use_fs() {
    modprobe "$1"
    case $1 in
    ext4) mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$device" ;;
    xfs) mkfs.xfs -q -f -K "$device" ;;
    esac
    mount "$device" /mnt/fs
    refused mount xpm blk detach "$name"
    fstrim /mnt/fs
    load /mnt/fs/load $FILE_MIB --do_verify=1
    note "$1: $FILE_MIB MiB written and verified"

    # Once more through a new mount: nothing of it comes from memory.
    umount /mnt/fs
    check_fs "$1" "$device"
    mount "$device" /mnt/fs
    load /mnt/fs/load $FILE_MIB --verify_only=1
    wait_for 20 resident_at_least $((FILE_MIB * MIB))
    local held
    held=$(resident)
    rm /mnt/fs/load
    sync -f /mnt/fs
    fstrim /mnt/fs
    wait_for 20 resident_at_most $((held - (FILE_MIB - 8) * MIB))
    note "$1: $((held / MIB)) MiB held at the appliances, $(($(resident) / MIB)) after fstrim"
    umount /mnt/fs
    check_fs "$1" "$device"
}

# on FORM TYPE...: these file systems one after the other on a device of that form.
on() {
    local form=$1 fs
    shift
    name=fs-$form
    attach "$name" 512MiB "$form" --stripe 2
    for fs in "$@"; do
        use_fs "$fs"
    done
    detach "$name"
    note "$form: done"
}

standby_is() {
    (xpm status --json || true) | jq -e --arg state "$1" '.blk.standby.state == $state'
}

# same_blocks BYTES: each form of one allocation has logical blocks of so many bytes, and finds the file system that
# was made on the first one.
same_blocks() {
    local form found
    xpm alloc create blocks --size 64MiB --block-size "$1" >/dev/null
    for form in ublk nbd nbd-direct; do
        device=$(xpm blk attach blocks --as $form 2>/run/lab/attach.err) || fail "$(cat /run/lab/attach.err)"
        found=$(blockdev --getss "$device")
        [ "$found" -eq "$1" ] || fail "blocks as $form has logical blocks of $found bytes, not $1"
        [ $form != ublk ] || mkfs.ext4 -q -F -E nodiscard "$device"
        check_fs ext4 "$device"
        xpm blk detach blocks
    done
    refused 'block' xpm blk attach blocks --as ublk --block-size $((4096 + 512 - $1))
    xpm alloc delete blocks
    note "blocks of $1 bytes in each form"
}

mkdir -p /mnt/fs
dmesg_start
load_module nbd
# Another scenario of this boot may have loaded it.
modprobe -r ublk_drv
start_blk
standby_is off || fail "a standby without a driver whose devices outlive their server: $(xpm status --json)"
load_module ublk_drv
wait_for 120 standby_is ready
note "the driver of ublk was loaded late, and a standby is ready"
same_blocks 4096
same_blocks 512
on ublk ext4 xfs
on nbd ext4
dmesg_clean
