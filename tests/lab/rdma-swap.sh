# Swap and a file system on ublk over RDMA: what is read and written passes by no appliance.
. "$LAB_SCRIPTS/rdma-lib.sh"

# swap_round NAME MB SWAPON-OPTION...: a program that needs so much and may have 128 MiB.
swap_round() {
    local name=$1 mb=$2 before
    shift 2
    before=$(shown "$name" '.counters.read_bytes')
    swapon "$@" "$device"
    (in_group "$group" memhog "$mb" --seed "$RANDOM" --passes 1 --run 64)
    swapoff "$device"
    local read=$((($(shown "$name" '.counters.read_bytes') - before) / 1048576))
    note "swap${*:+ $*}: $read MiB were read back"
    [ $read -ge 64 ] || fail "that is too little for a test"
    all_rdma "$name" 2
}

dmesg_start
start_pool 256MiB a1 a2
attach swap 320MiB ublk --stripe 2
all_rdma swap 2
before=$(answered)
sysctl -qw vm.page-cluster=5
mkswap "$device" >/dev/null
make_group limited memory.max=128M
swap_round swap 208
swap_round swap 192 --discard
answered_none_since "$before"
detach swap

attach fs 128MiB ublk --stripe 2
mkdir -p /mnt/fs
modprobe ext4
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$device"
mount "$device" /mnt/fs
load /mnt/fs/load 16 --do_verify=1
umount /mnt/fs
check_fs ext4 "$device"
mount "$device" /mnt/fs
load /mnt/fs/load 16 --verify_only=1
umount /mnt/fs
note "ext4: 16 MiB written and verified, and once more through a new mount"
all_rdma fs 2
answered_none_since "$before"
detach fs
nothing_left
dmesg_clean
