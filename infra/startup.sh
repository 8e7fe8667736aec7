#!/usr/bin/env bash
# Runs on each TPU VM at every boot, as root: pulls the image, runs the job, ships its log, leaves
# its exit code in the bucket and, if so asked, deletes the machine. All it needs is in the VM's
# metadata. It may run any number of times: a container that is running is followed, one that has
# stopped goes on, an attempt that has ended is not begun again.
#
# Secrets come from Secret Manager into this shell's memory and go to the container over its
# standard input: they are in no argument, no file, no `docker inspect` and no log.
#
# Usage: startup.sh   (no arguments; --dry-run prints what it would do)

set -euo pipefail

METADATA=http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1
STORAGE=${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}
SECRET_MANAGER=${CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER:-https://secretmanager.googleapis.com/}
LOGGING=${CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING:-https://logging.googleapis.com/}
TPU=${CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU:-https://tpu.googleapis.com/}
COMPUTE=${CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE:-https://compute.googleapis.com/compute/v1/}
FOLDER=${JOB_VM_FOLDER:-/var/lib/job}
TICK=${JOB_VM_TICK:-15}
CONTAINER=${JOB_VM_CONTAINER:-job}

say() { printf '%s startup: %s\n' "$(date -u +%FT%TZ)" "$*"; }

metadata() { # PATH
  curl -sf --retry 5 --retry-connrefused -H 'Metadata-Flavor: Google' "$METADATA/$1"
}

attribute() { # NAME
  metadata "instance/attributes/$1" || true
}

token() {
  metadata instance/service-accounts/default/token \
    | python3 -c 'import json, sys; print(json.load(sys.stdin)["access_token"])'
}

# curl with the service account's token, which is in no argument: the header comes from a pipe.
call() { # CURL-ARGUMENT...
  curl -sf --retry 5 --retry-connrefused --max-time 300 \
    -H @<(printf 'Authorization: Bearer %s\n' "$(token)") "$@"
}

# A pause that a signal ends at once: a preempted VM has half a minute.
nap() { # SECONDS
  sleep "$1" &
  wait $! || true
}

quoted() { # TEXT
  python3 -c 'import sys, urllib.parse; print(urllib.parse.quote(sys.argv[1], safe=""))' "$1"
}

put() { # FILE NAME
  call -o /dev/null -X POST -H 'Content-Type: text/plain' --data-binary "@$1" \
    "$STORAGE/upload/storage/v1/b/$BUCKET/o?uploadType=media&name=$(quoted "$PREFIX/$2")"
}

has_ended() {
  call "$STORAGE/storage/v1/b/$BUCKET/o?prefix=$(quoted "$PREFIX/marks/exit-$ATTEMPT-$WORKER-")" \
    | grep -q '"name"'
}

# The attempt is over: the log, the mark with the exit code, then the machine itself.
end() { # CODE REASON
  say "exit code $1${2:+: $2}"
  ship || true
  printf '%s\n' "$2" >"$FOLDER/reason"
  put "$FOLDER/reason" "marks/exit-$ATTEMPT-$WORKER-$1" || say "the exit code could not be written"
  delete_machine
  exit 0
}

delete_machine() {
  local path url
  path=$(attribute job-delete)
  [[ -n $path && $WORKER == 0 ]] || return 0
  say "deleting this machine"
  case $path in
    tpu\ *) url=$TPU${path#tpu } ;;
    compute\ *) url=$COMPUTE${path#compute } ;;
    *) return 0 ;;
  esac
  call -o /dev/null -X DELETE "$url" || say "this machine could not be deleted; the watcher does it"
}

# New lines of the log go to Cloud Logging, the whole of it to the bucket.
SHIPPED=0
ship() {
  local size
  size=$(stat -c %s "$FOLDER/log")
  ((size > SHIPPED)) || return 0
  put "$FOLDER/log" "logs/$ATTEMPT-$WORKER.log"
  tail -c "+$((SHIPPED + 1))" "$FOLDER/log" | head -c "$((size - SHIPPED))" \
    | python3 -c "$ENTRIES" "$PROJECT" "$RUN" "$WORKER" \
    | while IFS= read -r batch; do
      call -o /dev/null -X POST -H 'Content-Type: application/json' --data-binary @- \
        "${LOGGING}v2/entries:write" <<<"$batch" || say "Cloud Logging did not take the log"
    done
  SHIPPED=$size
}

# shellcheck disable=SC2016
ENTRIES='
import json, sys
project, run, worker = sys.argv[1:]
entries = []
for line in sys.stdin.buffer.read().decode(errors="replace").splitlines():
    try:
        payload = json.loads(line)
        assert isinstance(payload, dict)
    except (ValueError, AssertionError):
        entries.append({"textPayload": line})
        continue
    entry = {"jsonPayload": payload, "severity": payload.pop("severity", "DEFAULT")}
    if "time" in payload:
        entry["timestamp"] = payload.pop("time")
    entry["labels"] = payload.pop("logging.googleapis.com/labels", {})
    entries.append(entry)
for at in range(0, len(entries), 500):
    print(json.dumps({
        "logName": f"projects/{project}/logs/job",
        "resource": {"type": "global"},
        "labels": {"run": run, "worker": worker},
        "entries": entries[at : at + 500],
    }))
'

wait_for_docker() {
  local left=60
  if ! command -v docker >/dev/null; then
    say "installing Docker"
    { apt-get update -q && apt-get install -qy docker.io; } \
      || end 125 "Docker could not be installed"
  fi
  until docker info >/dev/null 2>&1; do
    ((left > 0)) || end 125 "Docker did not start within 5 minutes"
    left=$((left - 1))
    sleep 5
  done
}

# The registry's token is kept in memory only, and only while the image is pulled.
pull() {
  local left=5 registry=${IMAGE%%/*}
  ! docker image inspect "$IMAGE" >/dev/null 2>&1 || return 0
  DOCKER_CONFIG=$(mktemp -d /dev/shm/docker.XXXXXX)
  export DOCKER_CONFIG
  until token | docker login -u oauth2accesstoken --password-stdin "https://$registry" >/dev/null 2>&1 \
    && docker pull -q "$IMAGE"; do
    left=$((left - 1))
    ((left > 0)) || break
    nap "${JOB_VM_PAUSE:-20}"
  done
  rm -rf "$DOCKER_CONFIG"
  unset DOCKER_CONFIG
  ((left > 0)) || end 125 "the image $IMAGE could not be pulled"
}

# Lines of NAME=value; what is missing in Secret Manager is left out, and the job says so.
secrets() {
  local pair value
  for pair in $(attribute job-secrets); do
    value=$(call "${SECRET_MANAGER}v1/${pair#*=}/versions/latest:access" \
      | python3 -c 'import base64, json, sys
print(base64.b64decode(json.load(sys.stdin)["payload"]["data"]).decode().strip())' 2>/dev/null) || continue
    printf '%s=%s\n' "${pair%%=*}" "$value"
  done
}

# Reads secrets from standard input up to an empty line, then becomes the image's own command.
# shellcheck disable=SC2016
INSIDE='while IFS= read -r pair && [ -n "$pair" ]; do export "${pair?}"; done; exec "$@" </dev/null'

start() {
  local -a flags entrypoint
  read -ra flags <<<"$(attribute job-container-flags)"
  mapfile -t entrypoint < <(docker image inspect -f '{{range .Config.Entrypoint}}{{println .}}{{end}}' "$IMAGE" | sed '/^$/d')
  docker rm "$CONTAINER" >/dev/null 2>&1 || true
  mkdir -p "$FOLDER/cache" && chmod 1777 "$FOLDER/cache"
  { secrets; echo; } | docker run -i --name "$CONTAINER" --stop-timeout 25 "${flags[@]}" \
    -v "$FOLDER/cache:/cache" -e "JOB_IMAGE=$IMAGE" --entrypoint /bin/sh "$IMAGE" \
    -c "$INSIDE" sh "${entrypoint[@]}" run "$(attribute job-spec)" \
    --output "$(attribute job-output)" --run-id "$RUN" >>"$FOLDER/log" 2>&1 &
}

is_running() {
  [[ $(docker container inspect -f '{{.State.Running}}' "$CONTAINER" 2>/dev/null) == true ]]
}

# Gives the container its time to keep a checkpoint, and ships its last lines.
stop_job() {
  docker stop -t 25 "$CONTAINER" >/dev/null 2>&1 || true
  # They are in the log once the client that brings them has ended.
  [[ -z $CLIENT ]] || timeout 5 tail --pid="$CLIENT" -f /dev/null || true
  ship || true
}

# Follows the container to its end; its exit code is in CODE.
follow() {
  CLIENT=$!
  while kill -0 "$CLIENT" 2>/dev/null || is_running; do
    if (($(date +%s) > DEADLINE)); then
      stop_job
      end 124 "the maximum run time is over"
    fi
    nap "$TICK"
    ship || say "the log could not be shipped"
  done
  wait "$CLIENT" 2>/dev/null || true
  CODE=$(docker container inspect -f '{{.State.ExitCode}}' "$CONTAINER" 2>/dev/null || echo 125)
}

# shellcheck disable=SC2329
# The VM is being shut down: the job gets its time to keep a checkpoint.
shut_down() {
  say "shutting down"
  stop_job
  exit 0
}

if [[ ${1:-} == --help ]]; then
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  exit 0
fi
mkdir -p "$FOLDER"
exec 9>"$FOLDER/lock"
flock -n 9 || { say "already running" && exit 0; }

PROJECT=$(metadata project/project-id)
RUN=$(attribute job-run) ATTEMPT=$(attribute job-attempt) IMAGE=$(attribute job-image)
CONTROL=$(attribute job-control)
WORKER=$(attribute agent-worker-number)
WORKER=${WORKER:-0}
BUCKET=${CONTROL#gs://} PREFIX=${CONTROL#gs://*/}
BUCKET=${BUCKET%%/*}
touch "$FOLDER/log"
[[ -s $FOLDER/deadline ]] || echo $(($(date +%s) + $(attribute job-max-seconds))) >"$FOLDER/deadline"
DEADLINE=$(<"$FOLDER/deadline")

if [[ ${1:-} == --dry-run ]]; then
  say "run $RUN, attempt $ATTEMPT, worker $WORKER, image $IMAGE, until $(date -u -d "@$DEADLINE" +%T)"
  exit 0
fi
CLIENT=
trap shut_down TERM INT
if has_ended; then
  say "attempt $ATTEMPT of $RUN has ended"
  delete_machine
  exit 0
fi
wait_for_docker
pull
if is_running; then
  say "following the container that is running"
  docker logs -f "$CONTAINER" >"$FOLDER/log" 2>&1 &
else
  start
fi
while follow && ((CODE == 75)); do
  # Stopped early, or another VM's lease has not expired: the same command goes on.
  say "the job can go on; once more in ${JOB_VM_PAUSE:-20} s"
  nap "${JOB_VM_PAUSE:-20}"
  start
done
end "$CODE" "the job's container ended"
