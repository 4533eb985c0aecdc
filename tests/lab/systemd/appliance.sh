# The allocator's and the appliance's units in the guest: what is lent outlives the process by the file descriptor store of the
# real service manager.

own() { XPM_ALLOCATOR=http://127.0.0.1:7700 XPM_BLK=/run/own/blk.sock xpm "$@"; }

cat >>/etc/xpm/appliance.toml <<'TOML'
memory = "64MiB"
region-size = "16MiB"
allocator = "http://127.0.0.1:7700"
listen = "127.0.0.1:7701"
nbd = "127.0.0.1:10809"
TOML
systemctl restart xpm-appliance
# An xpm-blk beside the machine's own, for one has one allocator.
mkdir -p /run/own
printf 'allocator = "http://127.0.0.1:7700"\ncontrol = "/run/own/blk.sock"\nstate = "/run/own/state"\n' >/run/own/blk.toml
systemd-run -q --unit=own-blk -p MemorySwapMax=0 /usr/bin/xpm-blk --config /run/own/blk.toml
wait_for 30 own blk list
wait_for 30 own alloc create own --size 32MiB
disk=$(own blk attach own --as ublk --transport nbd-tcp)
dd if=/dev/urandom of="$disk" bs=1M count=32 oflag=direct status=none
sum=$(dd if="$disk" bs=1M iflag=direct status=none | sha256sum)

kept() {
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(timeout 60 dd if="$disk" bs=1M iflag=direct status=none | sha256sum)" = "$sum" ] ||
        fail "$1 lost what the appliance had lent"
}

stored=$(systemctl show -P NFileDescriptorStore xpm-appliance)
[ "$stored" -ge 3 ] || fail "the service manager keeps $stored descriptors, fewer than regions and their record"
systemctl restart xpm-appliance
kept "restarting the appliance"
systemctl kill -s KILL xpm-appliance
wait_for 30 systemctl is-active -q xpm-appliance
kept "killing the appliance"
systemctl daemon-reexec
systemctl restart xpm-appliance xpm-allocator
kept "executing systemd again"
note "the service manager kept $stored descriptors; nothing was lost by restarts"

# By its socket, orders wait while the allocator restarts.
systemctl stop xpm-allocator
systemctl start xpm-allocator.socket
own alloc list >/dev/null || fail "the socket did not start the allocator"
systemctl restart --no-block xpm-allocator
for _ in {1..20}; do
    own alloc list >/dev/null || fail "an order was refused while the allocator restarted"
done
systemctl stop xpm-allocator.socket

own blk detach own
wait_for 30 own alloc delete own
systemctl stop own-blk
systemctl disable -q --now xpm-appliance xpm-allocator
