# The lab itself: kernel modules, the host's root, the exchange directory and the network.
. "$LAB_SCRIPTS/lib.sh"

note "kernel $(uname -r), $(nproc) cores, $(free -m | awk '/^Mem/ {print $2}') MB"
load_module ublk_drv nbd xfs ext4 rdma_rxe
test -c /dev/ublk-control || fail "no /dev/ublk-control"
test -b /dev/nbd0 || fail "no /dev/nbd0"
test -x /usr/sbin/mkfs.ext4 || fail "the host's root is not there"
echo "guest was here" >/run/lab/from-guest || fail "the exchange directory cannot be written"
echo written >/usr/lab-test || fail "the overlay cannot be written"

exec 3<>"/dev/tcp/$LAB_HOST/$LAB_ECHO_PORT" || fail "the host cannot be reached"
printf 'GET / HTTP/1.0\r\n\r\n' >&3
answer=$(timeout 10 cat <&3)
grep -q "hello from the host" <<<"$answer" || fail "the host answered: $answer"
[ "$(cat /proc/sys/kernel/hung_task_panic)" = 1 ] || fail "hung_task_panic is off"
note "smoke done"
