# boot.sh RESTARTS: a machine with systemd whose swap, of a unit and of xpm-swapd, and one file system are external memory. It has the
# Debian packages; devices, swap and mount come up by themselves at each start, stand a program that needs more
# than the machine's memory, and go in order when the machine restarts while it runs.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/systemd/lib.sh"

restarts=$1
MIB=$((1 << 20))

configure() {
    echo "allocator = \"$XPM_ALLOCATOR\"" >>/etc/xpm/blk.toml
    echo "FORM=ublk" >/etc/xpm/blk.d/swap0.conf
    printf 'FORM=nbd\nOPTIONS=--depth 64\n' >/etc/xpm/blk.d/data.conf
    cat >/etc/systemd/system/dev-xpm-swap0.swap <<'UNIT'
[Unit]
Requires=xpm-blk@swap0.service
After=xpm-blk@swap0.service
[Swap]
What=/dev/xpm/swap0
Options=discard
Priority=100
TimeoutSec=5min
[Install]
WantedBy=xpm-blk@swap0.service
UNIT
    mkdir -p /mnt/data
    echo "/dev/xpm/data /mnt/data ext4 _netdev,nofail,discard,x-systemd.requires=xpm-blk@data.service 0 0" >>/etc/fstab
    systemctl daemon-reload
    xpm alloc create swap0 --size 1GiB >/dev/null
    xpm alloc create data --size 256MiB >/dev/null
    systemctl enable -q xpm-blk xpm-blk@swap0 xpm-blk@data dev-xpm-swap0.swap
    # Wanted by the device's unit, the swap would be turned on before it is made.
    systemctl restart xpm-blk
    mkswap "$(xpm blk attach swap0 --as ublk)" >/dev/null
    mkfs.ext4 -q "$(xpm blk attach data --as nbd --depth 64)"
    systemctl start xpm-blk@swap0 xpm-blk@data mnt-data.mount
    # Filled before the other.
    printf 'allocator = "%s"\nbase = "128MiB"\nmaximum = "128MiB"\npriority = 200\n' "$XPM_ALLOCATOR" >>/etc/xpm/swapd.toml
    systemctl enable -q --now xpm-swapd
}

swapd_is_on() {
    xpm swap status --json | jq -e '[.areas[].state] == ["on"]'
}

# The links and properties that udev gave a device.
check_device() {
    local name=$1 disk properties
    disk=$(basename "$(readlink -f "/dev/xpm/$name")")
    [ -b "/dev/$disk" ] || fail "/dev/xpm/$name leads to no device"
    properties=$(udevadm info -q property "/dev/$disk")
    for property in "XPM_NAME=$name" ID_VENDOR=xpm ID_MODEL=external_memory "ID_SERIAL=xpm_$name" UDISKS_IGNORE=1; do
        grep -qx "$property" <<<"$properties" || fail "$disk has not the property $property: $properties"
    done
    ! grep -q '^ID_FS' <<<"$properties" || fail "somebody looked for a file system on $disk: $properties"
    local setting
    for setting in queue/scheduler:none queue/rotational:0 queue/add_random:0 queue/read_ahead_kb:1024; do
        sed 's/.*\[\(.*\)\].*/\1/' "/sys/block/$disk/${setting%%:*}" | grep -qx "${setting#*:}" ||
            fail "$disk: ${setting%%:*} is $(cat "/sys/block/$disk/${setting%%:*}")"
    done
}

check_up() {
    wait_for 120 all_active xpm-blk xpm-blk@swap0 xpm-blk@data dev-xpm-swap0.swap mnt-data.mount xpm-swapd
    wait_for 120 swapd_is_on
    check_device swap0
    check_device data
    systemctl show -p JobRunningTimeoutUSec dev-xpm-swap0.device | grep -qx 'JobRunningTimeoutUSec=15min' ||
        fail "systemd waits for the device: $(systemctl show -p JobRunningTimeoutUSec dev-xpm-swap0.device)"
    grep -q "^$(readlink -f /dev/xpm/swap0) " /proc/swaps || fail "swap is not on: $(cat /proc/swaps)"
    xpm doctor >/run/lab/doctor.out || fail "xpm doctor: $(cat /run/lab/doctor.out)"
    systemctl start xpm-blk@swap0 || fail "starting a device that is there is refused"
}

# A program that needs more memory than there is, and goes on to verify its pages.
pressure() {
    local before mib
    before=$(awk '/^pswpout/ {print $2}' /proc/vmstat)
    mib=$(awk '/^MemAvailable/ {print int($2 / 1024) + 160}' /proc/meminfo)
    systemd-run -q --unit=hog -p OOMScoreAdjust=900 "$LAB_BIN/memhog" "$mib" --seed "$RANDOM" --passes 100000 --run 64
    wait_for 240 swapped_out_since "$before" 80
    systemctl is-active -q hog || fail "the program ended: $(journalctl -u hog -n 5 --no-pager)"
}

swapped_out_since() {
    local now
    now=$(awk '/^pswpout/ {print $2}' /proc/vmstat)
    [ $(((now - $1) * 4096 / MIB)) -ge "$2" ]
}

# The last start, and its end, as the journal has them.
check_last() {
    local journal=/run/lab/journal-$1 swap mount swapd blk network
    journalctl -b -1 --no-pager -o short-monotonic >"$journal"
    swap=$(grep -n 'Deactivated swap.*dev-xpm-swap0\.swap' "$journal" | tail -n 1 | cut -d: -f1)
    mount=$(grep -n 'Unmounted.*mnt-data\.mount' "$journal" | tail -n 1 | cut -d: -f1)
    swapd=$(grep -n 'Stopped.*xpm-swapd\.service' "$journal" | tail -n 1 | cut -d: -f1)
    blk=$(grep -n 'Stopped.*xpm-blk\.service' "$journal" | tail -n 1 | cut -d: -f1)
    network=$(grep -n 'Stopping.*lab-network\.service\|Stopped.*lab-network\.service' "$journal" | head -n 1 | cut -d: -f1)
    # shellcheck disable=SC2015 # `fail` ends the scenario
    [ "${swap:-0}" -gt 0 ] && [ "${mount:-0}" -gt 0 ] && [ "${blk:-0}" -gt "$swap" ] && [ "$blk" -gt "$mount" ] && [ "${network:-0}" -gt "$blk" ] &&
        [ "${swapd:-0}" -gt 0 ] && [ "$blk" -gt "$swapd" ] ||
        fail "not in order: swapoff in line ${swap:-none} of $journal, umount in ${mount:-none}, the end of xpm-swapd in ${swapd:-none}, of xpm-blk in ${blk:-none}, of the network in ${network:-none}"
    grep -q 'xpm-swapd.*the machine goes down: turning swap off' "$journal" || fail "xpm-swapd did not see that the machine goes down"
    ! sed -n '/turning swap off/,$p' "$journal" | grep 'goes on until nobody uses a device' ||
        fail "xpm-blk left devices to its standby while the machine went down"
    if grep -E "$dmesg_bad|systemd\[1\]: (xpm-blk|hog|dev-xpm|mnt-data|swap|Failed).*(Failed|failed)|bad page" "$journal"; then
        fail "something went wrong before the restart, see above"
    fi
}

dmesg_start
stage=$(next_stage boot)
note "start $stage: $(systemctl --version | head -n 1), up in $(cut -d' ' -f1 /proc/uptime) s"
if [ "$stage" -eq 0 ]; then
    install_packages 1
    configure
    dd if=/dev/urandom of=/mnt/data/kept bs=1M count=32 status=none
    sha256sum </mnt/data/kept >/run/lab/kept.sum
else
    check_last "$stage"
fi
check_up
sha256sum </mnt/data/kept | cmp - /run/lab/kept.sum || fail "the file system has other data"
note "devices, swap and file system are there"
[ "$stage" -ne 0 ] || . "$LAB_SCRIPTS/systemd/appliance.sh"
pressure
note "the program runs, $(awk '$1 != "Filename" {print $4 / 1024}' /proc/swaps) MiB in swap"
# The standby goes on with swap and file system until the next main process takes over.
before=$(systemctl show -P MainPID xpm-blk)
systemctl restart xpm-blk
[ "$(systemctl show -P MainPID xpm-blk)" -ne "$before" ] || fail "xpm-blk was not restarted"
sha256sum </mnt/data/kept | cmp - /run/lab/kept.sum || fail "the restart of xpm-blk lost data"
wait_for 30 xpm blk list
all_active hog xpm-blk@swap0 xpm-blk@data dev-xpm-swap0.swap mnt-data.mount || fail "the restart of xpm-blk took its users along"
note "xpm-blk restarted under live swap"
dmesg_clean
[ "$stage" -eq "$restarts" ] || restart_machine boot "$stage"

systemctl stop hog
xpm swap drain --all
systemctl disable -q --now xpm-swapd
systemctl disable -q xpm-blk@swap0 xpm-blk@data dev-xpm-swap0.swap
# The users of a device end with it.
systemctl stop xpm-blk@swap0 xpm-blk@data
! grep -q /dev/ /proc/swaps || fail "swap is still on"
! mountpoint -q /mnt/data || fail "/mnt/data is still mounted"
wait_for 10 test ! -e /dev/xpm/swap0 -a ! -e /dev/xpm/data
sed -i '/xpm/d' /etc/fstab
xpm alloc delete swap0
xpm alloc delete data
dmesg_clean
note "done"
