# file.sh ROUNDS: a program maps a file of external memory that is larger than the memory it may have, and verifies its pages,
# while the process that serves the file is killed, stopped and replaced. No page may be bad, and no task may hang.
. "$LAB_SCRIPTS/lib.sh"

rounds=$1
HOG_MB=16
LIMIT_MB=12

# A service manager in small: xpm-fs is started whenever the process that was started has ended.
manage_fs() {
    while [ -e /run/lab/managed ]; do
        (
            echo "$BASHPID" >/sys/fs/cgroup/xpm-fs/cgroup.procs
            exec xpm-fs --config /run/xpm/fs.toml
        ) >>/run/lab/fs.log 2>&1 &
        main=$!
        echo $main >/run/lab/main.pid
        wait $main || true
        sleep 0.2
    done
}

# Fields of the daemon's status: the process that serves, and its standby if that is ready.
find_fs() {
    local status
    status=$( (xpm status --json 2>/dev/null || true) | jq -er '.fs | select(.pid) | "\(.pid) \(.standby | if .state == "ready" then .pid else "" end)"') || return 1
    read -r serving standby <<<"$status"
    [ -n "$serving" ]
}

standby_is_ready() {
    find_fs && [ -n "$standby" ] && [ "$serving" = "$(cat /run/lab/main.pid)" ]
}

wait_standby() {
    wait_for 120 standby_is_ready
    find_fs
}

no_fs_left() { ! grep -l '^xpm-fs' /proc/[0-9]*/comm 2>/dev/null; }

dmesg_start
load_module fuse
make_group xpm-fs memory.swap.max=0
mkdir -p /run/xpm /var/lib/xpm/fs
cat >/run/xpm/fs.toml <<TOML
allocator = "$XPM_ALLOCATOR"
connect-limit = "60s"
hang-limit = "10s"
standby-reserve = "4MiB"
dirty-budget = "16MiB"
TOML
: >/run/lab/managed
manage_fs &
manager=$!
wait_for 60 xpm fs list
wait_standby

xpm alloc create ram --size 256MiB --stripe 2 >/dev/null
file=$(xpm fs attach ram --transport nbd-tcp) || fail "it cannot be attached: $(tail -n 3 /run/lab/fs.log)"
[ "$(stat -c %s "$file")" -eq $((256 << 20)) ] || fail "$file has $(stat -c %s "$file") bytes"

make_group lab-hog memory.max=${LIMIT_MB}M
rm -f /run/lab/enough
in_group "$group" memhog $HOG_MB --map "$file" --passes 1 --until /run/lab/no-end >/run/lab/hog.log 2>&1 &
hog=$!
filled() { grep -q filled /run/lab/hog.log; }
wait_for 300 filled
passes() { grep -c ' 0 bad' /run/lab/hog.log || true; }
note "$(head -n 1 /run/lab/hog.log); $(($(cat "$group/memory.peak") >> 20)) MiB at most in its cgroup"
refused 'in use' xpm fs detach ram
for ((round = 1; round <= rounds; round++)); do
    sleep "$((RANDOM % 3)).$((RANDOM % 1000))"
    case $((round % 3)) in
    1) kill -KILL "$serving" && note "process $serving: SIGKILL" ;;
    2) kill -STOP "$serving" && note "process $serving: SIGSTOP" ;;
    0) kill -TERM "$serving" && note "process $serving: SIGTERM" ;;
    esac
    kill -0 $hog || fail "the program ended: $(cat /run/lab/hog.log)"
    wait_standby
done
before=$(passes)
more() { [ "$(passes)" -gt $((before + 1)) ]; }
wait_for 300 more
kill $hog
wait $hog || true
! grep ' bad' /run/lab/hog.log | grep -v ' 0 bad' || fail "bad pages: $(cat /run/lab/hog.log)"
peak=$(($(cat "$group/memory.peak") >> 20))
[ $peak -le $LIMIT_MB ] || fail "the program had $peak MiB"
grep -q '^oom_kill 0' "$group/memory.events" || fail "the kernel killed: $(cat "$group/memory.events")"
note "$rounds rounds: $(passes) passes over $HOG_MB MB, of which $LIMIT_MB could be local, found 0 bad pages"

# All of it by reads, writes and verification, past the cache and through it.
fio --name=direct --filename="$file" --size=16M --offset=192M --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio \
    --iodepth=8 --verify=crc32c --verify_fatal=1 --randseed=7 >/run/lab/fio.out 2>&1 || fail "fio: $(tail -n 5 /run/lab/fio.out)"
fallocate --punch-hole --offset 0 --length 256M "$file"
wait_for 30 resident_at_most $((8 << 20))
note "a hole of all of it: $(($(resident) >> 20)) MiB are held"
xpm fs detach ram
[ ! -e "$file" ] || fail "$file is still there"
xpm alloc delete ram
rm /run/lab/managed
find_fs
kill -TERM "$serving"
wait $manager || true
wait_for 20 no_fs_left
dmesg_clean
note "done"
