# The common part of the scenarios with systemd. Sourced after lib.sh.

# next_stage NAME: how often the scenario has restarted the machine; an error when it restarted by itself.
next_stage() {
    local stage=/run/lab/$1.stage
    if [ -e "$stage" ]; then
        [ ! -e "$stage.running" ] || fail "the machine restarted by itself in stage $(cat "$stage")"
        echo $(($(cat "$stage") + 1)) >"$stage"
    else
        echo 0 >"$stage"
    fi
    : >"$stage.running"
    cat "$stage"
}

# restart_machine NAME: restarts the machine in order; the scenario is begun again then.
restart_machine() {
    note "restarting the machine"
    rm /run/lab/"$1".stage.running
    systemctl reboot
    sleep infinity
}

# install_packages NUMBER: of the versions 1 and 2 that the host made.
install_packages() {
    dpkg -i /run/lab/debs/"$1"/*.deb >/run/lab/dpkg.out 2>&1 || fail "installing: $(cat /run/lab/dpkg.out)"
}

# all_active UNIT...: whether each of them is; `systemctl is-active` is content with one.
all_active() {
    local unit
    for unit in "$@"; do
        systemctl is-active -q "$unit" || {
            echo "$unit is $(systemctl is-active "$unit")"
            return 1
        }
    done
}
