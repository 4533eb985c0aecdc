# A device that a program has open, or that is under a loop device, is not detached.
. "$LAB_SCRIPTS/lib.sh"

# opened HOW SECONDS: a program that has $device open for so long; $holder is its process.
opened() {
    python3 -c '
import os, sys, time
os.open(sys.argv[1], os.O_RDWR if sys.argv[2] == "write" else os.O_RDONLY)
print("open", flush=True)
time.sleep(float(sys.argv[3]))' "$device" "$1" "$2" >/run/lab/opened &
    holder=$!
    wait_for 20 grep -q open /run/lab/opened
}

close_it() {
    kill "$holder" 2>/dev/null || true
    wait "$holder" 2>/dev/null || true
    : >/run/lab/opened
}

# on FORM [OPTION...]
on() {
    local form=$1 name=open-$1
    shift
    attach "$name" 64MiB "$form" "$@"
    opened write 1000
    refused "opened by python3 \(process $holder\)" xpm blk detach "$name"
    close_it
    opened read 1000
    refused "opened for reading by python3 \(process $holder\)" xpm blk detach "$name"
    close_it
    local loop
    loop=$(losetup --find --show "$device")
    # Without requests that write zeros: a loop device on nbd-direct refuses them, which the kernel logs as an I/O error.
    UNIX_IO_NOZEROOUT=1 mkfs.ext4 -q -F -E nodiscard "$loop"
    mount -o noinit_itable "$loop" /mnt/loop
    echo kept >/mnt/loop/file
    refused "held by ${loop#/dev/} \(mounted at [^)]*/mnt/loop\)" xpm blk detach "$name"
    sync -f /mnt/loop
    [ "$(cat /mnt/loop/file)" = kept ] || fail "$form: the file is not there"
    umount /mnt/loop
    refused "held by ${loop#/dev/}" xpm blk detach "$name"
    losetup --detach "$loop"
    # A look is waited for.
    opened read 1
    detach "$name"
    close_it
    note "$form: done"
}

mkdir -p /mnt/loop
modprobe loop
modprobe ext4
dmesg_start
start_blk
on ublk
on nbd
on nbd-direct --region-size 64MiB
dmesg_clean
