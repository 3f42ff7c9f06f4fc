"""Stand-ins for adb and the binaries that it runs on a phone: small scripts which print what the real ones print.

What they print was recorded from: onnxruntime_perf_test, an Android build of 2025 (its own output as published with its
arm64 measurements, the result file as PerformanceResult::DumpToFile writes it); executor_runner of ExecuTorch 1.5
(ET_LOG lines of examples/portable/executor_runner, in the forms that runtime/platform/default/android.cpp and posix.cpp
give them).
"""

from collections.abc import Mapping
from pathlib import Path

ADB = r"""#!/bin/sh
# The phone is the folder $PHONE; what lies below /data/local/tmp/edgedit there lies in it.
if [ "$1" = -s ]; then [ "$2" = "$WANTED_SERIAL" ] || { echo "adb: device '$2' not found" >&2; exit 1; }; shift 2; fi
verb=$1; shift
there() { echo "$*" | sed "s#/data/local/tmp/edgedit#$PHONE/files#g"; }
case $verb in
  get-state) [ -d "$PHONE" ] || { echo "error: no devices/emulators found" >&2; exit 1; }; echo device ;;
  push) mkdir -p "$(dirname "$(there "$2")")"; cp -R "$1" "$(there "$2")"; echo "$1: 1 file pushed" ;;
  logcat)
    if [ "$1" = -c ]; then : >"$PHONE/log"
    else
      echo "--------- beginning of main"
      sed 's/^/11-27 10:00:00.123  4242  4242 I ExecuTorch: /' "$PHONE/log"
    fi ;;
  shell)
    case "$*" in
      "getprop ro.product.model") printf 'SM-S938B\r\n' ;;
      "dumpsys battery") printf 'Current Battery Service state:\r\n  level: 80\r\n  temperature: 315\r\n' ;;
      *) sh -c "$(there "$@")" ;;
    esac ;;
  *) echo "adb: unknown command $verb" >&2; exit 1 ;;
esac
"""

COUNT = r"""
calls=$(cat "$PHONE/calls" 2>/dev/null || echo 0); calls=$((calls + 1)); echo $calls >"$PHONE/calls"
if [ "$calls" = "${BREAKS_AT:-0}" ]; then echo "Segmentation fault" >&2; exit 139; fi
speed() { awk -v calls="$calls" -v slower="${SLOWER:-0}" 'BEGIN { print 1 + slower * calls }'; }
took() { awk -v name="$1" -v speed="$(speed)" '$1 == name { printf "%.9f", $2 * speed }' "$PHONE/times"; }
"""

PERF_TEST = (
    r"""#!/bin/sh
# onnxruntime_perf_test [options...] model_path [result_file]
"""
    + COUNT
    + r"""
while [ $# -gt 2 ]; do
  case $1 in
    -m) [ "$2" = times ] || exit 2; shift 2 ;;
    -r) runs=$2; shift 2 ;;
    -x) threads=$2; shift 2 ;;
    -y|-e) shift 2 ;;
    *) echo "ERROR: Unknown command line flag '$1'" >&2; exit 1 ;;
  esac
done
model=$1; result=$2
[ -f "$model" ] || { echo "Load model from $model failed:Load model $model failed. File doesn't exist" >&2; exit 1; }
[ -f "$(dirname "$model")/test_data_set_0/input_0.pb" ] || { echo "there is no test data for model networks"; exit 1; }
ms=$(took "$(basename "$model" .onnx)")
seconds() { awk -v ms="$ms" -v by="$1" 'BEGIN { printf "%.6g", by * ms / 1000 }'; }
echo "Setting intra_op_num_threads to $threads"
echo "Session creation time cost: $(seconds 3) s"
echo "First inference time cost: 196 ms"
echo "Total inference time cost: 0.49481 s"
echo "Total inference requests: $runs"
echo "Average inference time cost total: 98.961997 ms"
echo "Total inference run time: 0.494854 s"
echo "Number of inferences per second: 10.104"
echo "Avg CPU usage: 11 %"
echo "Peak working set size: 271122432 bytes"
run=0
while [ $run -lt $((runs - ${SHORT:-0})) ]; do
  echo "networks,$(seconds 1),271122432,11,$run" >>"$result"
  run=$((run + 1))
done
"""
)

RUNNER = (
    r"""#!/bin/sh
# executor_runner --model_path=… --inputs=… --num_executions=… --cpu_threads=… --print_output=none
"""
    + COUNT
    + r"""
for argument; do
  case $argument in
    --model_path=*) model=${argument#*=} ;;
    --inputs=*) inputs=${argument#*=} ;;
    --num_executions=*) runs=${argument#*=} ;;
    --cpu_threads=*|--print_output=none) ;;
    *) echo "ERROR: unknown command line flag '${argument%%=*}'" >&2; exit 1 ;;
  esac
done
say() {
  if [ "${PLATFORM:-android}" = android ]; then echo "$1" >>"$PHONE/log"
  else echo "I 00:00:00.000123 executorch:executor_runner.cpp:560] $1" >&2; fi
}
[ -f "$model" ] || { say "Failed to parse model file $model"; exit 1; }
for file in $(echo "$inputs" | tr , ' '); do [ -s "$file" ] || { say "Failed to open input file: $file"; exit 1; }; done
ms=$(took "$(basename "$model" .pte)")
say "Resetting threadpool with num threads = 4"
say "Model file $model is loaded."
say "Using method forward"
say "Model loaded in $(awk -v ms="$ms" 'BEGIN { printf "%f", 3 * ms }') ms."
run=0
while [ $run -lt $((runs - ${SHORT:-0})) ]; do
  run=$((run + 1))
  say "Iteration $run of $runs: $(printf %f "$ms") ms"
done
say "Model executed successfully $runs time(s) in 86.413000 ms."
say "1 outputs: "
"""
)


def write_standins(folder: Path, phone: Path, times: Mapping[str, float]) -> Path:
    """Put the stand-ins into a folder for PATH, and a phone whose networks take such milliseconds in another one.

    Returns:
        the folder, where the binaries to push lie too.
    """
    folder.mkdir()
    phone.mkdir()
    for name, text in (("adb", ADB), ("onnxruntime_perf_test", PERF_TEST), ("executor_runner", RUNNER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (phone / "times").write_text("".join(f"{name} {ms!r}\n" for name, ms in times.items()))
    return folder
