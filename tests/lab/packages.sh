# The Debian packages in a machine with systemd: installed, configured, used, upgraded under what uses them, removed and purged.
. "$LAB_SCRIPTS/lib.sh"
. "$LAB_SCRIPTS/systemd/lib.sh"

export XPM_ALLOCATOR=http://127.0.0.1:7700
names=(xpm-client xpm-appliance xpm-allocator libxpm0 libxpm0-dev)

# Files with xpm's name in the places where packages and daemons put things, of those that the machine has.
traces() {
    find /etc /run /var/lib /var/cache /usr/bin /usr/sbin /usr/include /usr/lib/systemd /usr/lib/udev /usr/lib/sysusers.d \
        /usr/lib/tmpfiles.d /usr/share/man/man[138] /usr/share/bash-completion /usr/share/zsh /usr/share/fish \
        -xdev -name '*xpm*' -not -path '/run/lab/*' -not -path '/run/udev/*' -not -path '/run/systemd/*' 2>/dev/null || true
    find /usr/share/doc /usr/lib "/usr/lib/$(uname -m)-linux-gnu" -maxdepth 1 -name '*xpm*'
    getent passwd | grep xpm || true
    getent group | grep xpm || true
    systemctl list-unit-files 'xpm*' --no-legend || true
}

pid_of() { systemctl show -P MainPID "$1"; }

# Whether the service manager keeps nothing but the record of what the appliance lends.
nothing_lent() { [ "$(systemctl show -P NFileDescriptorStore xpm-appliance)" -le 2 ]; }

purge_packages() {
    dpkg -P "${names[@]}" >/run/lab/dpkg.out 2>&1 || fail "purging: $(cat /run/lab/dpkg.out)"
}

dmesg_start
if dpkg -s xpm-client >/dev/null 2>&1; then purge_packages; fi
# Of daemons that were started by hand on the machine whose file systems these are.
rm -rf /var/lib/xpm-*
traces | sort >/run/lab/traces.before

install_packages 1
note "installed"
all_active xpm-allocator xpm-blk || fail "services do not run: $(systemctl status xpm-allocator xpm-blk --no-pager)"
[ "$(systemctl is-failed xpm-appliance)" = inactive ] || fail "xpm-appliance, which nobody told how much to lend: $(systemctl status xpm-appliance --no-pager)"
man -w xpm.1 xpm-blk.8 xpm-appliance.8 xpm-allocator.8 xpm.3 >/dev/null 2>&1 || ! command -v man >/dev/null || fail "manual pages are missing"
bash -n /usr/share/bash-completion/completions/xpm || fail "the completions are no script"

sed -i -e 's/^#memory = .*/memory = "96MiB"\nregion-size = "16MiB"/' -e 's/^#allocator/allocator/' /etc/xpm/appliance.toml
systemctl restart xpm-appliance
wait_for 30 xpm alloc create data --size 32MiB
echo FORM=ublk >/etc/xpm/blk.d/data.conf
systemctl enable -q --now xpm-blk@data || fail "$(systemctl status xpm-blk@data --no-pager)"
[ -b /dev/xpm/data ] || wait_for 10 test -b /dev/xpm/data
mkfs.ext4 -q /dev/xpm/data
mkdir -p /mnt/packages
mount /dev/xpm/data /mnt/packages
dd if=/dev/urandom of=/mnt/packages/kept bs=1M count=16 status=none
sum=$(sha256sum </mnt/packages/kept)
note "a file system is on external memory"

if command -v cc >/dev/null; then
    xpm alloc create numbers --size 32MiB
    # shellcheck disable=SC2046
    cc -o /tmp/sort /usr/share/doc/libxpm0-dev/examples/sort.c $(pkg-config --cflags --libs libxpm) || fail "the example does not compile"
    /tmp/sort numbers 8 || fail "the example does not run"
    xpm alloc delete numbers
    note "a program in C runs with libxpm"
fi

# A user who is not root may have external memory, for system calls too, when the operator puts him into the group; nobody else.
as_user() { setpriv --reuid=65534 --regid=65534 "$@"; }
external=(xpm run -v --size 48MiB --local 1MiB -- /usr/bin/python3 -c '
import hashlib, sys
held = bytearray(12 << 20)
with open(sys.argv[1], "rb", 0) as file:
    read = file.readinto(held)
print(read, hashlib.sha256(held).hexdigest())' /mnt/packages/kept)
refused 'group xpm' as_user --clear-groups "${external[@]}"
as_user --groups "$(getent group xpm | cut -d: -f3)" "${external[@]}" >/tmp/external.out 2>/tmp/external.err || fail "$(cat /tmp/external.err)"
[ "$(cat /tmp/external.out)" = "$((12 << 20)) $(head -c 12M /mnt/packages/kept | sha256sum | cut -d' ' -f1)" ] || fail "wrong bytes: $(cat /tmp/external.out)"
grep -qE 'up to (1[2-9]|[2-9][0-9]) MiB external.* [1-9][0-9]* written' /tmp/external.err || fail "it had no external memory: $(cat /tmp/external.err)"
note "a member of the group xpm: $(cat /tmp/external.err)"

before=$(pid_of xpm-appliance)
install_packages 2
grep -q '^memory = "96MiB"' /etc/xpm/appliance.toml || fail "the upgrade took the operator's configuration away"
for unit in xpm-allocator xpm-appliance xpm-blk xpm-blk@data; do
    systemctl is-active -q $unit || fail "after the upgrade $unit does not run: $(systemctl status $unit --no-pager)"
done
[ "$(pid_of xpm-appliance)" -ne "$before" ] || fail "the upgrade did not restart the appliance"
echo 3 >/proc/sys/vm/drop_caches
[ "$(sha256sum </mnt/packages/kept)" = "$sum" ] || fail "the upgrade lost data"
dd if=/dev/urandom of=/mnt/packages/more bs=1M count=4 conv=fsync status=none || fail "after the upgrade nothing can be written"
note "upgraded under a mounted file system"

refused 'in use' dpkg -r xpm-client
refused 'lends memory' dpkg -r xpm-appliance
[ "$(sha256sum </mnt/packages/kept)" = "$sum" ] || fail "a refused removal lost data"
umount /mnt/packages
systemctl disable -q --now xpm-blk@data
xpm alloc delete data
wait_for 30 nothing_lent
dpkg -r "${names[@]}" >/run/lab/dpkg.out 2>&1 || fail "removing: $(cat /run/lab/dpkg.out)"
for unit in xpm-allocator xpm-appliance xpm-blk; do
    ! systemctl is-active -q $unit || fail "$unit runs although it is removed"
done
[ -e /etc/xpm/appliance.toml ] || fail "removing took the operator's configuration away"
purge_packages
# Files of the operator stay.
[ -e /etc/xpm/blk.d/data.conf ] || fail "purging took away what is not the packages'"
rm /etc/xpm/blk.d/data.conf
rmdir /etc/xpm/blk.d /etc/xpm
traces | sort >/run/lab/traces.after
diff /run/lab/traces.before /run/lab/traces.after || fail "that is left behind"
dmesg_clean
note "removed and purged; nothing is left"
