# File systems on devices: verified load, trim that gives memory back, clean checks.
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

mkdir -p /mnt/fs
dmesg_start
start_blk
on ublk ext4 xfs
on nbd ext4
dmesg_clean
