#!/usr/bin/env bash
# Starts the job: reads secrets from files, checks GPUs and driver, and replaces itself by the job. What it refuses, it
# refuses before torch is loaded, with exit code 2 (settings); on Kubernetes with 72 where another node may serve.
set -euo pipefail && umask 002 # so that user ids of one group can take turns with a volume
here=$(dirname "$(readlink -f "$0")")
secrets=(AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AZURE_CLIENT_SECRET AZURE_STORAGE_ACCOUNT_KEY
  AZURE_STORAGE_CONNECTION_STRING AZURE_STORAGE_SAS_TOKEN HF_TOKEN MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN OCI_PASSWORD WANDB_API_KEY)
wrong='' open='' problem='' remedy='' rebuild='or build the image for older GPUs and drivers: infra/docker/README.md'

say() { # level, message: a log line in the job's format, which a line break in a path must not end
  local words=${2//[\"\\[:cntrl:]]/\'} now && now=$(date -u +%FT%T.%6NZ)
  printf '{"event": "%s", "level": "%s", "timestamp": "%s"}\n' "$words" "$1" "$now" >&2
}
refuse() { # message, code: logs it, writes it to where Kubernetes and SageMaker read a failure's reason, and exits
  say error "$1"
  for place in "${KUBERNETES_TERMINATION_LOG:-/dev/termination-log}" "${SAGEMAKER_BASE_DIR:-/opt/ml}/output/failure"; do
    { printf '%s' "$1" >"$place"; } 2>/dev/null || true
  done
  exit "${2-2}"
}
trap 'refuse "stopped by a signal before the job began; a restart begins it" 75' TERM INT # else 143, a failure
ours=' run train compare config export plan promote push report selftest serve-check status verify '
# SageMaker's SDK runs `chmod` in the image: a first word that is a program, and no command of the job, is run.
if [[ -n ${1-} && $1 != -* && $ours != *" $1 "* ]] && program=$(type -P -- "$1"); then exec "$program" "${@:2}"; fi

ask() { # words for nvidia-smi: sets answer and ended. `read` gives up where it hangs in the kernel, which no signal ends
  IFS= read -r -t 61 -d '' answer < <(set +e; exec 2>/dev/null; timeout 60 nvidia-smi "$@"; printf '\n%s' $?) ||
    (($? < 128)) || answer=$'\n124'
  ended=${answer##*$'\n'} answer=${answer%$'\n'*}; }
older() { [ -n "$1" ] && [ "$1" != "$2" ] && printf '%s\n' "$1" "$2" | sort -VC; } # version, other version

for name in "${secrets[@]}"; do
  file=${name}_FILE path=
  [ -z "${!file-}" ] || path=${!file}
  if [ -z "$path" ]; then continue
  elif [ -n "${!name-}" ]; then wrong+="$name and $file are both given: keep one. "
  elif ! value=$(cat -- "$path" 2>/dev/null); then wrong+="$file: user $(id -u) cannot read $path: mount it readable, or start as its owner (--user). "
  elif [ -z "$value" ]; then wrong+="$file: $path is empty: put the secret into it. "
  elif [[ $value == *[[:cntrl:]]* ]]; then wrong+="$file: $path has several lines or control characters: keep one. "
  else
    export "$name=$value" && unset "$file"
    ((0$(stat -Lc %a -- "$path") % 8 < 4)) || open+="$file ($path), "
  fi
done
[ -z "$wrong" ] || refuse "${wrong% }"
[ -z "$open" ] || say warning "Readable for every user of this machine: ${open%, }. Mode 0400 keeps a secret private"
[[ ${1-run} == @(run|train|-*) && " $* " != *' '@(-h|--help|--version)' '* ]] || exec python -m job "$@" # no GPU needed

if [ -s "$here/read-ahead" ]; then # the files that the job imports, into the page cache while nvidia-smi answers
  (xargs -0 -P 8 -n 64 cat -- <"$here/read-ahead" >/dev/null 2>&1 &)
fi
read -r built oldest <"$here/cuda" && ask # the CUDA that torch is built with, the least compute capability it serves
if [ "$ended" = 124 ]; then problem='nvidia-smi does not answer' remedy='a GPU or its driver is broken: restart the machine'
elif [ "$ended" != 0 ]; then
  problem='No GPU is visible' remedy="give it one: docker run --gpus all, or nvidia.com/gpu in the limits of a pod"
else
  driver=$(sed -nE 's/.*CUDA (UMD )?Version: *([0-9.]+).*/\2/p' <<<"$answer") # UMD: since driver 610
  ask --query-gpu=compute_cap,name,memory.total,driver_version --format=csv,noheader
  gpus= && [ "$ended" != 0 ] || gpus=$(sort -V <<<"${answer%$'\n'}")
  say info "GPUs: $(uniq -c <<<"$gpus" | sed 's/^ *//' | paste -sd ';'); CUDA of driver $driver, of image $built"
  if [ "$built" = none ]; then problem='The torch of this image is built without CUDA' remedy='take another image'
  elif older "${driver%%.*}" "${built%%.*}"; then
    problem="The driver serves CUDA $driver, this image needs $built" remedy="update the driver on the host, $rebuild"
  elif older "${gpus%%,*}" "$oldest"; then
    problem="A GPU has compute capability ${gpus%%,*}, this image serves $oldest and up" remedy="take another, $rebuild"
  else # Triton's start-up file, compiled when the image was built: there is no compiler here
    cache=${TRITON_CACHE_DIR:-$HOME/.triton/cache}
    { mkdir -p "$cache" && cp -rn "$here/triton/." "$cache"; } 2>/dev/null || true
  fi
fi
if [ -n "$problem" ]; then # refused, unless the settings say that the job may run on a CPU
  words=("$@") && case ${1-} in run | train) words=("${@:2}") ;; esac
  device=$(python -m job config "${words[@]}" 2>/dev/null | awk '$1 == "run.device" { print $2, $3 }') || device=
  case $device in '"gpu"'* | '"auto" default')
    code=2 && if [ -n "${KUBERNETES_SERVICE_HOST-}" ] && [ "$built" != none ]; then # one node may be at fault
      code=72 problem="${KUBERNETES_NODE_NAME:+node $KUBERNETES_NODE_NAME: }$problem"; fi
    refuse "$problem: $remedy. With JOB_RUN__DEVICE=cpu the job runs without; JOB_PRESET=demo needs none." $code ;; esac
  say info "$problem: going on without" && export CUDA_VISIBLE_DEVICES=
fi
exec env --block-signal=TERM python -m job "$@" # process 1 would lose the signal until Python handles it
