# RDMA over Soft-RoCE: xpm's verbs and perftest's in one guest. Prints `BENCH WHO.LOAD.METRIC VALUE` lines:
#   WHO     xpm: rdmaprobe on a region of an appliance; perftest: ib_read_lat, ib_write_lat, ib_read_bw
#   LOAD    read-spin, read-event, write-spin, write-event: 4 KiB at depth 1; read-qd16: 4 KiB at depth 16;
#           attach-1g: a client connects to a grant of 1 GiB and can use all of it (xpm)
#   METRIC  p50_us, iops, ms
# Both take turns, and each number is the median of the rounds.
. "$LAB_SCRIPTS/rdma-lib.sh"

ROUNDS=${1:-5}
COUNT=${2:-2000}

# by_perftest LOAD: "WHO.LOAD.METRIC VALUE", for loads that it has; the typical latency is the median, the rate is in millions.
by_perftest() {
    case $1 in
    read-spin) perftest ib_read_lat -n "$COUNT" | awk '{print "p50_us", $5}' ;;
    read-event) perftest ib_read_lat -n "$COUNT" -e | awk '{print "p50_us", $5}' ;;
    write-spin) perftest ib_write_lat -n "$COUNT" | awk '{print "p50_us", $5}' ;;
    read-qd16) perftest ib_read_bw -n $((COUNT * 4)) -t 16 -o 16 | awk '{print "iops", $5 * 1000000}' ;;
    esac | sed "s/^/perftest.$1./"
}

# by_xpm LOAD: the same.
by_xpm() {
    case $1 in
    attach-1g) rdmaprobe attach big | sed -E 's/.*attach_ms=([0-9.]+).*/ms \1/' ;;
    read-qd16) probe --op read --mode spin --depth 16 --count $((COUNT * 4)) | sed -E 's/.*iops=([0-9.]+).*/iops \1/' ;;
    *) probe --op "${1%-*}" --mode "${1#*-}" --count "$COUNT" | sed -E 's/.*p50_us=([0-9.]+).*/p50_us \1/' ;;
    esac | sed "s/^/xpm.$1./"
}

probe() {
    rdmaprobe latency small --len 4096 "$@"
}

medians() {
    python3 - <<'PYTHON'
import statistics
values = {}
for line in open("/run/lab/results"):
    name, value = line.split()
    values.setdefault(name, []).append(float(value))
for name, found in values.items():
    print("BENCH", name, statistics.median(found))
PYTHON
}

start_pool 1280MiB a1
xpm alloc create big --size 1GiB
xpm alloc create small --size 64MiB
for ((round = 1; round <= ROUNDS; round++)); do
    for load in read-spin read-event write-spin write-event read-qd16 attach-1g; do
        by_perftest $load >>/run/lab/results
        by_xpm $load >>/run/lab/results
    done
    note "round $round of $ROUNDS"
done
medians
