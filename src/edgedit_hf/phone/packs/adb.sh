#!/bin/sh
# Measures the networks of this folder on an Android phone and writes results.csv, for `edgedit phone import`.
#
#   BIN=path/to/binary ./adb.sh [RESULTS.csv]
#
# BIN      the binary, built for the phone (README.md); its libraries beside it in LIBS, if it has any
# VERSION  of the runtime that it was built from, such as 1.31.1
# THREADS  threads of a run (default 4). EP: ONNX Runtime's execution provider (default cpu)
# SERIAL   which phone, where several are connected
#
# Killed or cut off, it goes on where it stopped when it is started again with the same file.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
results=${1:-$here/results.csv}
bin=${BIN:?say where the binary is: BIN=path ./adb.sh}
version=${VERSION:?say which version of the runtime it is: VERSION=1.2.3}
threads=${THREADS:-4}
ep=${EP:-cpu}
on_phone=/data/local/tmp/edgedit
bundle=@BUNDLE@
inputs=@INPUTS@
warmups=@WARMUPS@
runs=@RUNS@
processes=@PROCESSES@

networks='@NETWORKS@'

# What it reads is this script's list, not its own standard input.
phone() { adb ${SERIAL:+-s "$SERIAL"} "$@" </dev/null; }
fail() { echo "adb.sh: $*" >&2; exit 1; }

# A number out of `dumpsys battery`, divided; nothing where the phone does not tell.
battery() {
  phone shell dumpsys battery 2>/dev/null | tr -d '\r' |
    awk -v key="$1:" -v by="$2" '$1 == key && $2 ~ /^-?[0-9]+$/ { printf "%.2f", $2 / by; exit }'
}

# row NETWORK PHASE ROUND MILLISECONDS
row() {
  awk -v ms="$4" 'BEGIN { exit !(ms ~ /^[0-9.eE+-]+$/ && ms + 0 > 0) }' ||
    fail "network $1 gave the time '$4'; see $log"
  printf '%s,%s,%s,%s,%s,"%s",,%s,%s,%s,%s,%s,%s\n' "$bundle" "$1" "$2" "$3" "$4" "$model" "$backend" "$threads" \
    "$version" "$charge" "$warmth" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >>"$part"
}

# Rows of a network's runs in a process, whose milliseconds stand a line each in $part.ms: the first are warm-ups.
rows_of_runs() {
  run=0
  while read -r ms; do
    if [ "$run" -lt "$warmups" ]; then row "$1" warm $((process * warmups + run)) "$ms"
    else row "$1" timed $((process * runs + run - warmups)) "$ms"; fi
    run=$((run + 1))
  done <"$part.ms"
  rm -f "$part.ms"
}

@RUN@

phone get-state >/dev/null 2>&1 || fail "no phone answers; connect one, allow USB debugging, see \`adb devices\`"
[ -f "$bin" ] || fail "there is no binary $bin"
model=$(phone shell getprop ro.product.model | tr -d '\r"')
part=$here/.part.csv
log=$here/last-run.log
header='@HEADER@'
if [ ! -f "$results" ]; then echo "$header" >"$results"; fi
[ "$(head -n 1 "$results")" = "$header" ] || fail "$results is no file of this script; give another name"
if grep -v "^$bundle," "$results" | grep -qv "^bundle,"; then fail "$results holds another bundle's rows"; fi

phone shell mkdir -p "$on_phone/networks" "$on_phone/inputs"
for folder in networks inputs; do phone push "$here/$folder/." "$on_phone/$folder/" >/dev/null; done
phone push "$bin" "$on_phone/$program" >/dev/null
if [ -n "${LIBS:-}" ]; then for library in $LIBS; do phone push "$library" "$on_phone/" >/dev/null; done; fi
phone shell chmod 755 "$on_phone/$program"

total=$(echo "$networks" | wc -l | tr -d ' ')
process=0
while [ "$process" -lt "$processes" ]; do
  number=0
  echo "$networks" | while read -r name file; do
    number=$((number + 1))
    # A process's rows are added together: where its load is, all are.
    if grep -q "^$bundle,$name,cold,$process," "$results"; then continue; fi
    echo "round $((process + 1)) of $processes, network $number of $total: $name"
    charge=$(battery level 100)
    warmth=$(battery temperature 10)
    : >"$part"
    measure "$name" "$file"
    cat "$results" "$part" >"$part.all"
    mv "$part.all" "$results" # at once: a kill leaves all of them or none
    rm -f "$part"
  done
  process=$((process + 1))
done
echo "$results: measured; now: edgedit phone import $results $here --device NAME"
