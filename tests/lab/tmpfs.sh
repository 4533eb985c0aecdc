# A tmpfs that is larger than memory: its pages go to swap and come back as they were.
. "$LAB_SCRIPTS/lib.sh"

FILES=14
FILE_MIB=20

dmesg_start
blk_settings=$small_blk
start_blk
swap_on ublk 1GiB --stripe 2
mkdir -p /mnt/tmpfs
mount -t tmpfs -o size=$((FILES * FILE_MIB + 50))M tmpfs /mnt/tmpfs
cd /mnt/tmpfs || exit

for ((file = 1; file <= FILES; file++)); do
    head -c ${FILE_MIB}M /dev/urandom | tee "$file" | md5sum | sed "s/-/$file/" >>/run/lab/sums
done
note "$FILES files of $FILE_MIB MiB written"
used=$(awk '$1 == device {print int($4 / 1024)}' device="$device" /proc/swaps)
[ "$used" -ge 100 ] || fail "only $used MiB of it are in swap"
md5sum --quiet --check /run/lab/sums || fail "a file came back changed"
note "$used MiB of it were in swap, and all is as it was"

cd /
umount /mnt/tmpfs
rm /run/lab/sums
swap_off ublk
dmesg_clean
note "done"
