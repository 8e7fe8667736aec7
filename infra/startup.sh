#!/usr/bin/env bash
# Startup script of each TPU VM. It runs as root at every boot: pull the image, run the job, upload
# its log, write its exit code to the bucket, and delete the machine if the metadata says so. All
# inputs come from the VM's metadata.
#
# It is safe to run many times. It follows a running container and resumes a stopped one. If the
# attempt has ended, it only deletes the machine.
#
# Secrets go from Secret Manager to this shell's memory, and from there to the container's standard
# input. They are in no argument, no file, no `docker inspect` output and no log.
#
# Usage: startup.sh [--dry-run]
#
#   --dry-run   print what it would do

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

log() { printf '%s startup: %s\n' "$(date -u +%FT%TZ)" "$*"; }

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

# Run curl with the service account's token. A pipe passes the header, so no argument holds the token.
call() { # CURL-ARGUMENT...
  curl -sf --retry 5 --retry-connrefused --max-time 300 \
    -H @<(printf 'Authorization: Bearer %s\n' "$(token)") "$@"
}

# Sleep until the time is up or a signal arrives. A preempted VM has only 30 seconds.
sleep_interruptibly() { # SECONDS
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

attempt_has_ended() {
  call "$STORAGE/storage/v1/b/$BUCKET/o?prefix=$(quoted "$PREFIX/marks/exit-$ATTEMPT-$WORKER-")" \
    | grep -q '"name"'
}

# End the attempt: upload the log, write the exit mark, delete the machine.
end() { # CODE REASON
  log "exit code $1${2:+: $2}"
  upload_log || true
  printf '%s\n' "$2" >"$FOLDER/reason"
  put "$FOLDER/reason" "marks/exit-$ATTEMPT-$WORKER-$1" || log "cannot write the exit mark"
  delete_machine
  exit 0
}

delete_machine() {
  local path url
  path=$(attribute job-delete)
  [[ -n $path && $WORKER == 0 ]] || return 0
  log "deleting this machine"
  case $path in
    tpu\ *) url=$TPU${path#tpu } ;;
    compute\ *) url=$COMPUTE${path#compute } ;;
    *) return 0 ;;
  esac
  call -o /dev/null -X DELETE "$url" || log "cannot delete this machine; the watcher will"
}

# Upload the full log to the bucket, and its new lines to Cloud Logging.
UPLOADED=0
upload_log() {
  local size
  size=$(stat -c %s "$FOLDER/log")
  ((size > UPLOADED)) || return 0
  put "$FOLDER/log" "logs/$ATTEMPT-$WORKER.log"
  tail -c "+$((UPLOADED + 1))" "$FOLDER/log" | head -c "$((size - UPLOADED))" \
    | python3 -c "$ENTRIES" "$PROJECT" "$RUN" "$WORKER" \
    | while IFS= read -r batch; do
      call -o /dev/null -X POST -H 'Content-Type: application/json' --data-binary @- \
        "${LOGGING}v2/entries:write" <<<"$batch" || log "cannot write to Cloud Logging"
    done
  UPLOADED=$size
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
    log "installing Docker"
    { apt-get update -q && apt-get install -qy docker.io; } \
      || end 125 "cannot install Docker"
  fi
  until docker info >/dev/null 2>&1; do
    ((left > 0)) || end 125 "Docker did not start within 5 minutes"
    left=$((left - 1))
    sleep 5
  done
}

# Pull the image. The registry's token is only in memory, and only during the pull.
pull() {
  local left=5 registry=${IMAGE%%/*}
  ! docker image inspect "$IMAGE" >/dev/null 2>&1 || return 0
  DOCKER_CONFIG=$(mktemp -d /dev/shm/docker.XXXXXX)
  export DOCKER_CONFIG
  until token | docker login -u oauth2accesstoken --password-stdin "https://$registry" >/dev/null 2>&1 \
    && docker pull -q "$IMAGE"; do
    left=$((left - 1))
    ((left > 0)) || break
    sleep_interruptibly "${JOB_VM_PAUSE:-20}"
  done
  rm -rf "$DOCKER_CONFIG"
  unset DOCKER_CONFIG
  ((left > 0)) || end 125 "cannot pull the image $IMAGE"
}

# Print the secrets as NAME=value lines. A secret missing from Secret Manager is skipped; the job reports it.
secrets() {
  local pair value
  for pair in $(attribute job-secrets); do
    value=$(call "${SECRET_MANAGER}v1/${pair#*=}/versions/latest:access" \
      | python3 -c 'import base64, json, sys
print(base64.b64decode(json.load(sys.stdin)["payload"]["data"]).decode().strip())' 2>/dev/null) || continue
    printf '%s=%s\n' "${pair%%=*}" "$value"
  done
}

# Runs in the container: read secrets from standard input up to an empty line, then exec the image's entrypoint.
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

# Stop the container, with time to save a checkpoint, and upload its last lines.
stop_job() {
  docker stop -t 25 "$CONTAINER" >/dev/null 2>&1 || true
  # The last lines are in the log once the Docker client has exited.
  [[ -z $CLIENT ]] || timeout 5 tail --pid="$CLIENT" -f /dev/null || true
  upload_log || true
}

# Follow the container until it exits. Set CODE to its exit code.
follow() {
  CLIENT=$!
  while kill -0 "$CLIENT" 2>/dev/null || is_running; do
    if (($(date +%s) > DEADLINE)); then
      stop_job
      end 124 "reached the maximum run time"
    fi
    sleep_interruptibly "$TICK"
    upload_log || log "cannot upload the log"
  done
  wait "$CLIENT" 2>/dev/null || true
  CODE=$(docker container inspect -f '{{.State.ExitCode}}' "$CONTAINER" 2>/dev/null || echo 125)
}

# shellcheck disable=SC2329
# Handle a VM shutdown: give the job time to save a checkpoint.
shut_down() {
  log "shutting down"
  stop_job
  exit 0
}

if [[ ${1:-} == --help ]]; then
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  exit 0
fi
mkdir -p "$FOLDER"
exec 9>"$FOLDER/lock"
flock -n 9 || { log "already running" && exit 0; }

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
  log "run $RUN, attempt $ATTEMPT, worker $WORKER, image $IMAGE, until $(date -u -d "@$DEADLINE" +%T)"
  exit 0
fi
CLIENT=
trap shut_down TERM INT
if attempt_has_ended; then
  log "attempt $ATTEMPT of $RUN has already ended"
  delete_machine
  exit 0
fi
wait_for_docker
pull
if is_running; then
  log "following the running container"
  docker logs -f "$CONTAINER" >"$FOLDER/log" 2>&1 &
else
  start
fi
while follow && ((CODE == 75)); do
  # Exit code 75: stopped early, or another VM's lease has not expired yet. Run the same command again.
  log "the job stopped early; resuming in ${JOB_VM_PAUSE:-20} s"
  sleep_interruptibly "${JOB_VM_PAUSE:-20}"
  start
done
end "$CODE" "the container exited"
