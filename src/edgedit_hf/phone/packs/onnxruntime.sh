program=onnxruntime_perf_test
backend=$ep

# One process: it loads the network, runs it once by itself, then so often as -r says; the first of those are warm-ups.
# It finds its inputs in the folder beside the network. Every run is a line of its result file: name,seconds,…
measure() {
  phone shell rm -f "$on_phone/times.csv"
  phone shell "cd $on_phone && LD_LIBRARY_PATH=$on_phone ./$program -m times -r $((warmups + runs)) -x $threads -y 1 \
    -e $ep networks/$2 times.csv" >"$log" 2>&1 || fail "$program failed with $1; see $log"
  load=$(tr -d '\r' <"$log" | sed -n 's/^Session creation time cost: *\([0-9.eE+-]*\) s.*/\1/p' | tail -n 1)
  phone shell cat "$on_phone/times.csv" | tr -d '\r' | awk -F, 'NF >= 5 { printf "%.6f\n", 1000 * $2 }' >"$part.ms"
  [ "$(wc -l <"$part.ms" | tr -d ' ')" -eq $((warmups + runs)) ] ||
    fail "$program gave $(wc -l <"$part.ms") times of $1 for $((warmups + runs)) runs; see $log"
  rows_of_runs "$1"
  row "$1" cold "$process" "$(awk -v seconds="$load" 'BEGIN { printf "%.6f", 1000 * seconds }')"
}
