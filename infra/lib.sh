#!/usr/bin/env bash
# What the scripts of this folder share: settings, messages, gcloud with its errors told apart,
# and small helpers. The state of a run is in state.sh, the machines in vm_queued.sh and
# vm_gce.sh. To be sourced; it does nothing by itself but set up.

# Variables are shared by the files of this folder.
# shellcheck disable=SC2034,SC2154

set -euo pipefail

INFRA=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname -- "$INFRA")
WORK=$(mktemp -d "${TMPDIR:-/tmp}/job-infra.XXXXXX")
DRY_RUN=${DRY_RUN:-}
trap 'rm -rf -- "$WORK"' EXIT

say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

# Ends with exit code 2 (arguments, settings, spec) or 3 (the environment), those of `job`.
misuse() { # MESSAGE
  printf 'error: %s\n' "$1" >&2
  exit 2
}

fail() { # MESSAGE
  printf 'error: %s\n' "$1" >&2
  exit 3
}

# Prints a script's opening comment as its help: the lines up to the first that is none.
show_help() { # FILE
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
}

# Settings: a flag, then the environment, then the file, then what is written here.
SETTINGS=(PROJECT REGION ZONES MACHINE PROVISIONER SPOT BUCKET OUTPUT REPOSITORY IMAGE
  SERVICE_ACCOUNT SECRETS SELF_DELETE WAIT_SECONDS MAX_RUN_SECONDS MAX_ATTEMPTS BACKOFF_SECONDS
  POLL_SECONDS LEASE_SECONDS SETTLE_SECONDS NETWORK SUBNETWORK BOOT_DISK_GB CONTAINER_FLAGS)

load_settings() {
  local file=${INFRA_CONFIG:-$INFRA/config.env} line key value number=0
  if [[ -n ${INFRA_CONFIG:-} && ! -r $file ]]; then
    misuse "INFRA_CONFIG=$file cannot be read"
  fi
  if [[ -r $file ]]; then
    while IFS= read -r line || [[ -n $line ]]; do
      number=$((number + 1))
      [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
      key=${line%%=*} value=${line#*=}
      if [[ $line != *=* || " ${SETTINGS[*]} " != *" $key "* ]]; then
        misuse "$file:$number: '$line' is no setting; write NAME=value with a name of config.env.example"
      fi
      if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
      [[ -n ${!key:-} ]] || printf -v "$key" %s "$value"
    done <"$file"
  fi
  : "${PROJECT:=${CLOUDSDK_CORE_PROJECT:-}}"
  [[ -n $PROJECT ]] || fail \
    "no project: copy infra/config.env.example to infra/config.env and set PROJECT there"
  : "${ZONES:=us-west4-a us-central1-a us-west1-c us-south1-a}"
  : "${REGION:=$(first_region "$ZONES")}"
  : "${MACHINE:=v5e-8}" "${PROVISIONER:=queued}" "${SPOT:=yes}" "${SELF_DELETE:=yes}"
  : "${BUCKET:=$PROJECT-jobs}" "${OUTPUT:=gs://$BUCKET/runs}"
  : "${REPOSITORY:=job}" "${IMAGE:=$REGION-docker.pkg.dev/$PROJECT/$REPOSITORY/job:tpu}"
  : "${SERVICE_ACCOUNT:=job-runner@$PROJECT.iam.gserviceaccount.com}"
  : "${SECRETS=HF_TOKEN OPENROUTER_API_KEY}"
  : "${WAIT_SECONDS:=21600}" "${MAX_RUN_SECONDS:=14400}" "${MAX_ATTEMPTS:=10}"
  : "${BACKOFF_SECONDS:=60}" "${POLL_SECONDS:=30}" "${LEASE_SECONDS:=180}" "${SETTLE_SECONDS:=60}"
  : "${NETWORK:=default}" "${SUBNETWORK:=}" "${BOOT_DISK_GB:=200}"
  : "${CONTAINER_FLAGS=--privileged --net=host --user root --shm-size=16g --ulimit memlock=-1}"
  check_settings
  export CLOUDSDK_CORE_PROJECT=$PROJECT CLOUDSDK_CORE_DISABLE_PROMPTS=1
  CONTROL=gs://$BUCKET/infra
}

first_region() { # ZONES
  local zone=${1%% *}
  printf '%s' "${zone%-*}"
}

check_settings() {
  local key
  for key in WAIT_SECONDS MAX_RUN_SECONDS MAX_ATTEMPTS LEASE_SECONDS BOOT_DISK_GB; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || misuse "$key='${!key}': write a whole number above 0"
  done
  for key in BACKOFF_SECONDS POLL_SECONDS SETTLE_SECONDS; do
    [[ ${!key} =~ ^[0-9]+(\.[0-9]+)?$ ]] || misuse "$key='${!key}': write a number of seconds"
  done
  for key in SPOT SELF_DELETE; do
    [[ ${!key} =~ ^(yes|no)$ ]] || misuse "$key='${!key}': write yes or no"
  done
  for key in $ZONES; do
    [[ $key =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || misuse \
      "ZONES: '$key' is no zone; write zones like us-west4-a, separated by spaces"
  done
  [[ -r $INFRA/vm_$PROVISIONER.sh ]] || misuse \
    "PROVISIONER='$PROVISIONER': write queued (queued resources) or gce (Compute Engine)"
}

use_provisioner() { # NAME
  # shellcheck source=/dev/null
  source "$INFRA/vm_$1.sh"
}

# Splits off the flags that every script has; what is left is in ARGUMENTS.
common_flags() { # FILE ARGUMENT...
  local file=$1
  shift
  ARGUMENTS=()
  while (($#)); do
    case $1 in
      -h | --help) show_help "$file" && exit 0 ;;
      --dry-run) DRY_RUN=yes ;;
      *) ARGUMENTS+=("$1") ;;
    esac
    shift
  done
}

refuse_flag() { # SCRIPT ARGUMENT
  misuse "$1: '$2' is not understood; see infra/$1 --help"
}

need_gcloud() {
  [[ -n $DRY_RUN ]] || command -v gcloud >/dev/null || fail \
    "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
}

# The job's own command, from this checkout unless JOB names another.
job() {
  local command
  read -ra command <<<"${JOB:-uv run --quiet --project $ROOT job}"
  command -v "${command[0]}" >/dev/null || fail \
    "${command[0]} is not installed: pip install uv, or set JOB to the job command"
  "${command[@]}" "$@"
}

# Values of a JSON file by their paths, like 0.machine_type: a line each, empty where null.
json_values() { # FILE PATH...
  python3 -c '
import json, sys
document = json.load(open(sys.argv[1]))
for path in sys.argv[2:]:
    value = document
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else (value or {}).get(part)
    print("" if value is None else value)
' "$@"
}

print_command() { # COMMAND...
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

# Runs gcloud. Its output is in ANSWER (to the byte in $WORK/answer); if it failed, what it said is in PROBLEM, in one line,
# and the kind of the failure in KIND. In a dry run a question is neither asked nor printed and
# counts as answered by nothing (SHOW_READS=yes prints it); a change is printed as it would be run.
ANSWER='' PROBLEM='' KIND='' SHOW_READS=''
ask() {
  local status=0
  ANSWER='' PROBLEM='' KIND=ok
  if [[ -n $DRY_RUN ]]; then
    [[ -z $SHOW_READS ]] || print_command gcloud "$@"
    return 1
  fi
  timeout "${GCLOUD_TIMEOUT:-120}" gcloud "$@" >"$WORK/answer" 2>"$WORK/stderr" || status=$?
  ANSWER=$(<"$WORK/answer")
  ((status == 0)) || explain "$status"
  return "$status"
}

change() {
  if [[ -n $DRY_RUN ]]; then
    print_command gcloud "$@"
    ANSWER='' PROBLEM='' KIND=ok
    return 0
  fi
  ask "$@"
}

# Sets PROBLEM and KIND from what gcloud wrote: missing, exists, conflict (a precondition),
# quota, capacity, denied, login, invalid, or unclear, where the call may have taken effect.
explain() { # STATUS
  local text
  text=$(grep -v '^WARNING' "$WORK/stderr" | tr -s '\n\t ' ' ' \
    | sed 's/ This command is authenticated .*//; s/^ERROR: //' | cut -c1-600)
  PROBLEM=${text:-gcloud ended with status $1}
  if (($1 == 124)); then
    KIND=unclear PROBLEM="gcloud gave no answer within ${GCLOUD_TIMEOUT:-120} s"
    return
  fi
  case ${text,,} in
    *"per minute"* | *rate_limit* | *ratelimit* | *"rate limit"*) KIND=unclear ;;
    *quota*) KIND=quota ;;
    *resource_exhausted* | *"no more capacity"* | *resource_pool_exhausted* | *stockout* | \
      *"not have enough resources"* | *"currently unavailable"*) KIND=capacity ;;
    *already_exists* | *"already exists"* | *"already own it"* | *alreadyexists*) KIND=exists ;;
    *precondition* | *pre-condition* | *"error 412"*) KIND=conflict ;;
    *not_found* | *"not found"* | *"error 404"* | *"matched no objects"* | *"does not exist"*) KIND=missing ;;
    *unauthenticated* | *"reauthentication"* | *"error 401"* | *"credential"* | \
      *"active account"* | *"gcloud auth login"*) KIND=login ;;
    *permission_denied* | *"does not have permission"* | *"error 403"* | *"permission "*) KIND=denied ;;
    *invalid_argument* | *"error 400"* | *"invalid value"* | *unrecognized*) KIND=invalid ;;
    *) KIND=unclear ;;
  esac
}

# Ends the script over a gcloud failure, in one line.
stop_at() { # WHAT
  local hint=''
  case $KIND in
    login) hint='; run: gcloud auth login' ;;
    denied) hint='; ask for the roles that infra/README.md lists' ;;
  esac
  fail "$1: $PROBLEM$hint"
}

# A name for the machine and the labels of a run: what Google Cloud takes of the run id, and a
# digest, for the run of another bucket may have the same id.
machine_name() { # RUN
  local name=${1,,}
  name=${name//[^a-z0-9-]/-}
  name=job-${name:0:40}
  name=${name%"${name##*[!-]}"}
  printf '%s-%s' "$name" "$(printf %s "$CONTROL/$1" | sha256sum | cut -c1-8)"
}

secret_name() { # VARIABLE
  local name=${1,,}
  printf 'job-%s' "${name//_/-}"
}

now() { date +%s; }

# The one argument of a script, a run: RUN and the NAME of its machine.
take_run() { # SCRIPT ARGUMENT...
  local script=$1
  shift
  [[ ${1:-} != -* ]] || refuse_flag "$script" "$1"
  (($# == 1)) || misuse "$script: name one run; see infra/$script --help"
  RUN=${1##*/}
  [[ $RUN =~ ^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$ ]] || misuse \
    "$script: '$1' is no run; infra/status.sh lists them"
  load_settings
  NAME=$(machine_name "$RUN")
  need_gcloud
}

no_such_run() {
  misuse "there is no run '$RUN' in $CONTROL; infra/status.sh lists them"
}
