# A service manager in small for xpm-blk, and what kills it. Sourced after lib.sh.
#
# The loops use nothing but the shell's own words while xpm-blk is dead: another program could not start then.

never=/run/never
[ -p $never ] || mkfifo $never

# In the shell itself, and with pauses between two looks: each look starts programs, which a guest without memory reads in again.
sleep() { read -rt "$1" _ <>"$never" || true; }
look_every=2

# The file says which program the manager starts as xpm-blk; a scenario that upgrades it writes another path there.
blk_program_file=/run/lab/blk.program
[ -e $blk_program_file ] || command -v xpm-blk >$blk_program_file

# Starts what starts xpm-blk whenever the process that it started has ended, and locks this shell's own memory as far as that
# goes: its pages are read again and again, and it is not chosen when memory runs out.
start_managed_blk() {
    make_group xpm-blk memory.swap.max=0
    mkdir -p /run/xpm /var/lib/xpm-blk
    cat >/run/xpm/blk.toml <<TOML
allocator = "$XPM_ALLOCATOR"
control = "/run/xpm/blk.sock"
state = "/var/lib/xpm-blk"
queues = 2
depth = 16
buffer = "1MiB"
threads = 1
hang-limit = "15s"
standby-reserve = "16MiB"
${blk_settings:-}
TOML
    modprobe ublk_drv
    # As a service manager's: the shells of the test are not swapped out themselves.
    make_group lab-shell memory.swap.max=0
    echo $$ >"$group/cgroup.procs"
    begin_managing
    wait_for 60 xpm blk list
}

begin_managing() {
    : >/run/lab/managed
    manage_blk &
    manager=$!
}

manage_blk() {
    while [ -e /run/lab/managed ]; do
        # The file is appended to by all, so that none writes over another's lines.
        (
            echo "$BASHPID" >/sys/fs/cgroup/xpm-blk/cgroup.procs
            exec "$(<$blk_program_file)" --config /run/xpm/blk.toml
        ) >>/run/lab/blk.log 2>&1 &
        main=$!
        echo $main >/run/lab/main.pid
        wait $main || true
        sleep 0.2
    done
}

# The process that serves and the one that is ready to go on, in $serving and $standby.
find_blk() {
    local status
    status=$( (xpm status --json 2>/dev/null || true) | jq -er '.blk | select(.pid) | "\(.pid) \(.standby | if .state == "ready" then .pid else "" end)"') || return 1
    read -r serving standby <<<"$status"
    [ -n "$serving" ]
}

standby_is_ready() {
    find_blk && [ -n "$standby" ] && [ "$serving" = "$(cat /run/lab/main.pid)" ]
}

# Until the process that the manager started serves, and has a standby.
wait_standby() {
    wait_for 120 standby_is_ready
    # wait_for asks in a shell of its own.
    find_blk
}

# kill_blk serving|standby SIGNAL
kill_blk() {
    local pid=${!1}
    kill "-$2" "$pid"
    note "$1 process $pid: SIG$2"
}

has_swapped() {
    [ $((($(awk '/^pswpout/ {print $2}' /proc/vmstat) - before) / 256)) -ge "$1" ]
}

# Process $old is gone.
is_replaced() { [ ! -e "/proc/$old" ]; }

# A restart as its manager performs it: tells the main process to end, and starts another one. Until the old process is gone, it
# says that all is as it was.
restart_blk() {
    local old=$serving
    kill_blk serving TERM
    wait_for 60 is_replaced
    wait_standby
}

# A new process takes over from the one that serves, and the manager's next one from that.
replace_blk() {
    (
        echo "$BASHPID" >/sys/fs/cgroup/xpm-blk/cgroup.procs
        exec "$(<$blk_program_file)" --config /run/xpm/blk.toml
    ) >>/run/lab/blk.log 2>&1 &
    local new=$! old=$serving
    wait_for 60 is_replaced
    wait_standby
    wait $new || fail "the process that took over did not end well"
    note "process $new took over from process $old, and process $serving from that"
}

# Starts xpm-swapd with one area, which is what is always there, and waits for it; $name and $device are its then.
swapd_swap_on() {
    sysctl -qw vm.page-cluster=5
    cat >/run/xpm/swapd.toml <<TOML
allocator = "$XPM_ALLOCATOR"
base = "1GiB"
maximum = "1GiB"
TOML
    start_swapd
    read -r name device <<<"$(xpm swap status --json | jq -r '.areas[0] | "\(.name) \(.path)"')"
    note "xpm-swapd has put swap on $device, $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB of memory"
}

start_swapd() {
    make_group xpm-swapd memory.swap.max=0
    start_daemon swapd in_group "$group" "${swapd_program:-xpm-swapd}" --config /run/xpm/swapd.toml
    swapd_pid=$pid
    wait_for 60 base_is_on
}

# end_swapd SIGNAL: ends it; its swap stays.
end_swapd() {
    kill "-$1" "$swapd_pid"
    note "xpm-swapd, process $swapd_pid: SIG$1"
    wait "$swapd_pid" 2>/dev/null || true
}

base_is_on() {
    xpm swap status --json | jq -e '[.areas[].state] == ["on"]'
}

no_blk_left() {
    ! grep -l '^xpm-blk' /proc/[0-9]*/comm 2>/dev/null
}

# start_hogs MB: programs, one after the other, that fill and verify so much memory, until end_hogs.
start_hogs() {
    rm -f /run/lab/enough
    make_group lab-hogs
    (
        echo "$BASHPID" >"$group/cgroup.procs"
        seed=0
        while [ ! -e /run/lab/enough ]; do
            seed=$((seed + 1))
            memhog "$1" --seed $seed --passes 1 --run 64 || exit 1
        done
    ) >/run/lab/hogs.log 2>&1 &
    hogs=$!
}

hogs_live() {
    kill -0 "$hogs" 2>/dev/null || fail "a program ended: $(cat /run/lab/hogs.log)"
}

end_hogs() {
    : >/run/lab/enough
    wait "$hogs" || fail "a program found bad pages: $(cat /run/lab/hogs.log)"
    passes=$(grep -c ' 0 bad' /run/lab/hogs.log)
    [ "$passes" -gt 0 ] || fail "no pass was ended"
    ! grep ' bad' /run/lab/hogs.log | grep -v ' 0 bad' || fail "bad pages, see above"
}

# watch_gaps DEVICE: measures until end_gaps how long reads of the device take at most.
watch_gaps() {
    rm -f /run/lab/gaps.end
    iogap "$1" /run/lab/gaps.end >/run/lab/gaps.log 2>&1 &
    gaps=$!
}

end_gaps() {
    : >/run/lab/gaps.end
    wait "$gaps" || fail "$(cat /run/lab/gaps.log)"
}

# no_errors NAME: no request of the device ended with an error, by xpm-blk's own account.
no_errors() {
    xpm blk show "$1" --json | jq -e '(.counters.errors // 0) == 0' >/dev/null ||
        fail "requests failed: $(xpm blk show "$1" --json)"
}

stop_managed_blk() {
    wait_standby
    rm -f /run/lab/managed
    kill -TERM "$serving"
    wait "$manager" || true
    wait_for 10 no_blk_left
}
