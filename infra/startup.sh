#!/usr/bin/env bash
# Startup script of each TPU VM, run as root at every boot. It only installs a systemd unit and
# returns, because Google's runner of startup scripts ends first at a shutdown, and with it the
# script's output. All inputs come from the VM's metadata.
#
#   job-deadline waits for the metadata server, starts a timer for job-delete at the deadline, and
#                starts job. It does not wait for Docker.
#   job          pulls the image, runs the job, uploads its log, writes its exit code to the bucket, and
#                starts job-delete at its end
#   job-delete   stops the job and deletes the machine, again and again until it is gone
#
# Each unit is safe to run many times. `job` follows a running container and resumes a stopped one. If
# the attempt has ended, it only deletes the machine.
#
# Secrets go from Secret Manager to the shell's memory, and from there to the container's standard
# input. They are in no argument, no file, no `docker inspect` output and no log.
#
# Usage: startup.sh [deadline | run | delete | --dry-run]
#
#   deadline, run, delete   the units job-deadline, job and job-delete
#   --dry-run               print what it would do

set -euo pipefail

METADATA=http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1
STORAGE=${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}
SECRET_MANAGER=${CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER:-https://secretmanager.googleapis.com/}
LOGGING=${CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING:-https://logging.googleapis.com/}
TPU=${CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU:-https://tpu.googleapis.com/}
COMPUTE=${CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE:-https://compute.googleapis.com/compute/v1/}
FOLDER=${JOB_VM_FOLDER:-/var/lib/job}
MEMORY=${JOB_VM_MEMORY:-/run/job}
TICK=${JOB_VM_TICK:-15}
PAUSE=${JOB_VM_PAUSE:-20}
CONTAINER=${JOB_VM_CONTAINER:-job}

log() {
  printf '%s startup: %s\n' "$(date -u +%FT%TZ)" "$*" | tee -a "$FOLDER/log" || true
}

metadata() { # PATH
  curl -sf --retry 3 --retry-connrefused --max-time 30 -H 'Metadata-Flavor: Google' "$METADATA/$1"
}

# Keep the VM's metadata in a file, and read one attribute from it.
read_metadata() {
  metadata 'instance/attributes/?recursive=true' >"$FOLDER/attributes.new" || return
  mv "$FOLDER/attributes.new" "$FOLDER/attributes"
}

attribute() { # NAME
  python3 -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], ""))' \
    "$FOLDER/attributes" "$1"
}

token() {
  metadata instance/service-accounts/default/token | sed -n 's/.*"access_token": *"\([^"]*\)".*/\1/p'
}

# Run curl with the service account's token. A pipe passes the header, so no argument holds the token.
call() { # CURL-ARGUMENT...
  curl -sf --retry 5 --retry-connrefused --retry-max-time 120 --max-time 120 \
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

# End the attempt: upload the log, write the exit mark, delete the machine.
end() { # CODE REASON
  trap '' TERM
  log "exit code $1${2:+: $2}"
  write_mark "$1" "$2" || true # a full disk must not keep the machine
  [[ $WORKER != 0 ]] || systemctl start --no-block job-delete
  exit 0
}

# Write the exit mark of the attempt, or the first one again.
write_mark() { # CODE REASON
  local code
  code=$(cat "$FOLDER/code" 2>/dev/null)
  # A full disk keeps no code, and memory keeps it until the next boot.
  if [[ -z ${code:=$(cat "$MEMORY/code" 2>/dev/null)} ]]; then
    code=$1
    printf '%s\n' "$2" >"$FOLDER/reason"
    printf '%s' "$1" | tee "$MEMORY/code" >"$FOLDER/code"
  fi
  upload_log || log "cannot upload the log"
  put "$FOLDER/reason" "marks/exit-$ATTEMPT-$WORKER-$code" || log "cannot write the exit mark"
}

# Stop the job, and delete the machine. Fail, so that systemd starts the unit again, until it is gone.
# Every host of a slice does so at the deadline, but only the first host at the end of its job.
delete_machine() {
  local path url
  read_metadata || true # what an earlier start of a unit has read will do
  read_attributes
  systemctl stop job || true
  timeout 60 docker stop -t 25 "$CONTAINER" >/dev/null 2>&1 || true # its unit may wait for a restart
  write_mark 124 "reached the maximum run time" || true
  path=$(attribute job-delete)
  case $path in
    tpu\ *) url=$TPU${path#tpu } ;;
    compute\ *) url=$COMPUTE${path#compute } ;;
    *) exit 0 ;;
  esac
  log "deleting this machine"
  call -o /dev/null -X DELETE "$url" || log "cannot delete this machine yet"
  exit 1
}

# Upload the full log to the bucket, and its new lines to Cloud Logging.
upload_log() {
  local size uploaded
  uploaded=$(cat "$FOLDER/uploaded" 2>/dev/null || echo 0)
  size=$(stat -c %s "$FOLDER/log")
  ((size > uploaded)) || return 0
  put "$FOLDER/log" "logs/$ATTEMPT-$WORKER.log" || return
  tail -c "+$((uploaded + 1))" "$FOLDER/log" | head -c "$((size - uploaded))" \
    | python3 -c "$ENTRIES" "$PROJECT" "$RUN" "$WORKER" \
    | while IFS= read -r batch; do
      call -o /dev/null -X POST -H 'Content-Type: application/json' --data-binary @- \
        "${LOGGING}v2/entries:write" <<<"$batch" || log "cannot write to Cloud Logging"
    done
  echo "$size" >"$FOLDER/uploaded"
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
  local left=20
  until timeout 60 docker info >/dev/null 2>&1; do
    ((left-- > 0)) || end 125 "Docker cannot be installed or does not start"
    if ! command -v docker >/dev/null; then
      log "installing Docker"
      # Another process may hold apt's locks at boot. The timeout covers only one of them.
      { apt-get -o DPkg::Lock::Timeout=300 update -q \
        && apt-get -o DPkg::Lock::Timeout=300 install -qy docker.io; } >>"$FOLDER/log" 2>&1 || true
    fi
    sleep_interruptibly "$TICK"
  done
}

# Pull the image. The registry's token is only in memory, and only during the pull.
pull() {
  local left=5
  ! docker image inspect "$IMAGE" >/dev/null 2>&1 || return 0
  log "pulling $IMAGE"
  DOCKER_CONFIG=$(mktemp -d /dev/shm/docker.XXXXXX)
  export DOCKER_CONFIG
  trap 'rm -rf -- "${DOCKER_CONFIG:-}"' EXIT
  until pull_once; do
    left=$((left - 1))
    ((left > 0)) || end 125 "cannot pull the image $IMAGE"
    sleep_interruptibly "$PAUSE"
  done
  rm -rf "$DOCKER_CONFIG"
  unset DOCKER_CONFIG
}

# A signal interrupts `wait`, but no command in the foreground.
pull_once() {
  { token | docker login -u oauth2accesstoken --password-stdin "https://${IMAGE%%/*}" >/dev/null \
    && docker pull -q "$IMAGE"; } >>"$FOLDER/log" 2>&1 &
  wait $!
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
  local device
  local -a flags entrypoint
  read -ra flags <<<"$(attribute job-container-flags)"
  mapfile -t entrypoint < <(docker image inspect -f '{{range .Config.Entrypoint}}{{println .}}{{end}}' "$IMAGE" | sed '/^$/d')
  # The devices of the TPU, rather than all that --privileged gives.
  for device in /dev/vfio/* /dev/accel*; do
    [[ ! -c $device ]] || flags+=(--device "$device")
  done
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

# Stop the container, with time to save a checkpoint, and upload its last lines. Called at a shutdown
# of the VM, and by job-delete.
# shellcheck disable=SC2329
shut_down() {
  log "shutting down"
  docker stop -t 25 "$CONTAINER" >/dev/null 2>&1 || true
  # The last lines are in the log once the Docker client has exited.
  [[ -z $CLIENT ]] || timeout 5 tail --pid="$CLIENT" -f /dev/null || true
  upload_log || true
  exit 0
}

# Follow the container until it exits. Set CODE to its exit code, or to 75 if Docker was lost, which
# may stop the container, kill it, or leave it running.
follow() {
  local lost='' daemon
  CLIENT=$!
  daemon=$(systemctl show --property=MainPID docker) || true
  while kill -0 "$CLIENT" 2>/dev/null; do
    sleep_interruptibly "$TICK"
    upload_log || log "cannot upload the log"
  done
  STARTED=$(stat -c %Y "$FOLDER/log")
  # Docker may be up again, as another process.
  { timeout 60 docker info && [[ $(systemctl show --property=MainPID docker) == "$daemon" ]]; } >/dev/null 2>&1 || lost=yes
  [[ -z $lost ]] || log "Docker has stopped; waiting for it"
  wait_for_docker
  CODE=$(docker container inspect -f '{{.State.ExitCode}}' "$CONTAINER" 2>/dev/null) || CODE=125
  if is_running || [[ $CODE == 255 || (-n $lost && ! $CODE =~ ^[0234]$) ]]; then CODE=75; fi
}

# Set the variables that the metadata gives. Fail if they are not there yet.
read_attributes() {
  PROJECT=$(attribute job-project)
  RUN=$(attribute job-run)
  ATTEMPT=$(attribute job-attempt)
  IMAGE=$(attribute job-image)
  WORKER=$(attribute agent-worker-number)
  WORKER=${WORKER:-0}
  BUCKET=$(attribute job-control)
  BUCKET=${BUCKET#gs://}
  PREFIX=${BUCKET#*/} BUCKET=${BUCKET%%/*}
  [[ -s $FOLDER/deadline ]] || echo $(($(date +%s) + $(attribute job-max-seconds))) >"$FOLDER/deadline"
  DEADLINE=$(<"$FOLDER/deadline")
}

# Run a command of this script as a unit.
start_unit() { # UNIT COMMAND OPTION...
  local unit=$1 command=$2
  shift 2
  systemctl cat "$unit.service" >/dev/null 2>&1 || systemd-run "--unit=$unit" --collect --no-block "$@" \
    --property=Restart=on-failure "--property=RestartSec=$PAUSE" bash "$MEMORY/startup.sh" "$command"
}

# Start the timer for the deletion, and then the job, which waits for Docker.
start_deadline() {
  local left most
  read_metadata || [[ -s $FOLDER/attributes ]] || { log "waiting for the metadata server" && exit 1; }
  read_attributes
  left=$((DEADLINE - $(date +%s))) most=$(attribute job-max-seconds)
  left=$((left < most ? left : most)) # the clock may have been wrong
  start_unit job-delete delete "--on-active=$((left > 1 ? left : 1))" --timer-property=AccuracySec=1s
  # At a shutdown the job gets SIGTERM before Docker does, and time to save a checkpoint.
  start_unit job run --property=After=docker.service --property=After=network-online.target \
    --property=KillMode=mixed --property=TimeoutStopSec=60
}

run_job() {
  CLIENT=
  read_attributes
  trap shut_down TERM INT
  [[ ! -s $FOLDER/code ]] || end "$(<"$FOLDER/code")" "the attempt has ended before"
  CODE=75
  while ((CODE == 75)); do
    wait_for_docker
    pull
    if is_running; then
      log "following the running container"
      docker logs -f --since "$STARTED" "$CONTAINER" >>"$FOLDER/log" 2>&1 &
    else
      start
    fi
    follow
    # Exit code 75: stopped early, or another VM's lease has not expired yet.
    ((CODE != 75)) || { log "resuming the job in $PAUSE s" && sleep_interruptibly "$PAUSE"; }
  done
  end "$CODE" "the container exited"
}

main() {
  if [[ ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
    exit 0
  fi
  mkdir -p "$FOLDER" "$MEMORY"
  : >>"$FOLDER/log" # its time stays that of the last line
  STARTED=$(stat -c %Y "$FOLDER/log")
  case ${1:-} in
    deadline) start_deadline ;;
    run) run_job ;;
    delete) delete_machine ;;
    --dry-run)
      read_metadata
      read_attributes
      log "run $RUN, attempt $ATTEMPT, worker $WORKER, image $IMAGE, until $(date -u -d "@$DEADLINE" +%T)"
      ;;
    *)
      cp -- "$0" "$MEMORY/startup.sh" # the disk may be full
      start_unit job-deadline deadline
      ;;
  esac
}

# Bash reads the full script before main starts, so a boot can replace the file.
main "$@"; exit
