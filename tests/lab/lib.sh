# What the scenarios share. Sourced by each of them; needs bash.
set -euo pipefail

fail() {
    echo "FAIL: $*"
    exit 1
}

note() {
    printf '%5.1f  %s\n' "$(cut -d' ' -f1 /proc/uptime)" "$*"
}

# refused TEXT COMMAND...: the command must fail, and say TEXT (a regular expression) when it does.
refused() {
    local text=$1 out
    shift
    if out=$("$@" 2>&1); then
        fail "not refused: $*"
    fi
    grep -qiE "$text" <<<"$out" || fail "refused for another reason than /$text/: $* said: $out"
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "still not so: $*"
        sleep 0.2
    done
}

# Starts xpm-blk on the guest and stops it when the scenario ends, however it ends.
start_blk() {
    mkdir -p /run/xpm /var/lib/xpm-blk
    cat >/run/xpm/blk.toml <<TOML
allocator = "$XPM_ALLOCATOR"
control = "/run/xpm/blk.sock"
state = "/var/lib/xpm-blk"
TOML
    xpm-blk --config /run/xpm/blk.toml >"/run/lab/$LAB_NAME.log" 2>&1 &
    blk_pid=$!
    trap stop_blk EXIT
    wait_for 30 xpm blk list
}

stop_blk() {
    local status=$?
    trap - EXIT
    if [ $status -ne 0 ]; then
        echo "--- xpm-blk's log:"
        tail -n 40 "/run/lab/$LAB_NAME.log"
    fi
    kill "$blk_pid" 2>/dev/null || true
    wait "$blk_pid" 2>/dev/null || true
    exit $status
}

# The kernel must not have complained since the scenario began.
dmesg_start() {
    dmesg_lines=$(dmesg | wc -l)
}

dmesg_clean() {
    local bad='I/O error|blocked for more than|Read-error|Write-error|BUG:|WARNING:|Oops|rcu.*stall|Buffer I/O|EXT4-fs error|XFS.*(corrupt|shut ?down)|invoked oom-killer'
    if dmesg | tail -n +$((dmesg_lines + 1)) | grep -E "$bad"; then
        fail "the kernel's log has the lines above"
    fi
}

# Bytes that granted regions hold at all appliances together.
resident_bytes() {
    xpm appliance list --json | python3 -c '
import json, sys
print(sum(a["status"]["resident"] for a in json.load(sys.stdin)))'
}
