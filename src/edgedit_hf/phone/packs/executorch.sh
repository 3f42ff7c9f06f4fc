program=executor_runner
backend=xnnpack

# One process: it loads the network and runs it so often as --num_executions says; the first of those are warm-ups. What
# it says goes to the phone's log where it was built for Android, to its own output elsewhere.
measure() {
  count=$((warmups + runs))
  given=$(echo "$inputs" | sed "s#[^,]*#$on_phone/inputs/&#g")
  phone logcat -c >/dev/null 2>&1 || true
  phone shell "cd $on_phone && LD_LIBRARY_PATH=$on_phone ./$program --model_path=networks/$2 --inputs=$given \
    --num_executions=$count --cpu_threads=$threads --print_output=none" >"$log" 2>&1 ||
    fail "$program failed with $1; see $log"
  grep -q 'Iteration [0-9]* of' "$log" || phone logcat -d -s ExecuTorch:I >>"$log"
  load=$(tr -d '\r' <"$log" | sed -n 's/.*Model loaded in \([0-9.]*\) ms\..*/\1/p' | tail -n 1)
  tr -d '\r' <"$log" | sed -n "s/.*Iteration [0-9]* of $count: \([0-9.]*\) ms.*/\1/p" >"$part.ms"
  [ -n "$load" ] && [ "$(wc -l <"$part.ms" | tr -d ' ')" -eq "$count" ] ||
    fail "$program gave $(wc -l <"$part.ms") times of $1 for $count runs (it needs ExecuTorch 1.3 or later, built with \
EXECUTORCH_ENABLE_LOGGING=ON and EXECUTORCH_LOG_LEVEL=Info); see $log"
  rows_of_runs "$1"
  row "$1" cold "$process" "$load"
}
