# Every daemon is restarted in place, under swap and a mounted file system, as an upgrade does: told to end and started anew by its
# manager; xpm-blk also by a new process that takes over from the one that serves. Nothing may fail, and no byte be wrong.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/standby-lib.sh"

rounds=$1

# As systemd has it: what is unmounted here is so for an xpm-blk, too, that was started when it was mounted.
mount --make-rshared /
dmesg_start
start_managed_blk
wait_standby
modprobe ext4
attach fs 512MiB ublk --stripe 2
fs=$device
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$fs"
mkdir -p /mnt/fs
mount "$fs" /mnt/fs

# Without pressure: what a restart costs those who read.
watch_gaps "$fs"
for ((round = 1; round <= 2; round++)); do
    restart_blk
done
end_gaps
note "$(cat /run/lab/gaps.log), over 2 restarts without load"

swapd_swap_on
swap=$device
before=$(awk '/^pswpout/ {print $2}' /proc/vmstat)
watch_gaps "$swap"
start_hogs 420
load /mnt/fs/load 64 --do_verify=1 --loops=3 &
fio=$!
wait_for 60 has_swapped 30
for ((round = 1; round <= rounds; round++)); do
    restart_blk
    replace_blk
    end_swapd TERM
    start_swapd
    for daemon in appliance-1 appliance-2 allocator; do
        on_host restart "$daemon" "0.$((RANDOM % 9))"
        hogs_live
    done
done
wait $fio || fail "fio: $(tail -n 5 /run/lab/fio.out)"
end_hogs
end_gaps
note "$(cat /run/lab/gaps.log), over $rounds restarts of each daemon and replacements of xpm-blk under load"
umount /mnt/fs
check_fs ext4 "$fs"
mount "$fs" /mnt/fs
load /mnt/fs/load 64 --verify_only=1
no_errors fs
no_errors "$name"
# Its swap is to be turned off below.
end_swapd TERM
note "ext4 and swap: verified"

# Told to end with nobody who starts it again: the standby goes on until nothing is in use.
rm /run/lab/managed
old=$serving
kill -TERM "$serving"
wait "$manager" || true
[ ! -e /proc/"$old" ] || fail "the process that was told to end is still there"
wait_for 60 find_blk
find_blk
[ "$serving" != "$old" ] || fail "nobody else serves"
load /mnt/fs/load 64 --verify_only=1
umount /mnt/fs
[ -e /proc/"$serving" ] || fail "it ended although swap was in use"
take_swap_off "$swap"
is_gone() { [ ! -e /proc/"$serving" ]; }
wait_for 60 is_gone
wait_for 10 no_blk_left
note "told to end: the standby served on until nothing was in use, and ended"

with_another_life() {
    begin_managing
    wait_standby
}

# The records bring the devices back, and nothing else is there.
with_another_life
detach "$name"

# Both killed at once: nobody goes on, and the next life finds the device that is mounted, with what was in flight.
kill_both() {
    note "processes $serving and $standby: SIGKILL at once"
    kill -9 "$serving" "$standby"
}
mount "$fs" /mnt/fs
load /mnt/fs/load 64 --do_verify=1 --loops=2 &
fio=$!
command sleep 2
kill_both
wait_standby
wait $fio || fail "fio: $(tail -n 5 /run/lab/fio.out)"
no_errors fs
umount /mnt/fs
check_fs ext4 "$fs"
note "both were killed under load: the file system is whole"

# One that no record speaks of is left while somebody has it, and said; and taken away when nobody uses it.
python3 -c 'import os, sys, time; os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL); time.sleep(10000)' "$fs" &
holder=$!
rm /run/lab/managed
kill_both
wait "$manager" || true
rm /var/lib/xpm-blk/devices/fs.json
with_another_life
[ -b "$fs" ] || fail "a device in use was taken away"
grep -q "/dev/${fs#/dev/} was left by an earlier xpm-blk" /run/lab/blk.log || fail "nothing is said of it"
stop_managed_blk
kill $holder
wait $holder || true
with_another_life
wait_for 30 test ! -e "$fs"
fs=$(xpm blk attach fs --as ublk)
check_fs ext4 "$fs"
detach fs
note "a device that no record speaks of: left while it is in use, then taken away, and attached anew"
stop_managed_blk
dmesg_clean
note "done"
