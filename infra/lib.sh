#!/usr/bin/env bash
# Shared code for the scripts in this folder: settings, messages, gcloud calls with classified
# errors, and small helpers. state.sh has the state of a run. vm_queued.sh and vm_gce.sh have the
# machines. Source this file; it only sets up variables and functions.

# The scripts in this folder share variables.
# shellcheck disable=SC2034,SC2154

case $BASH_VERSION in
  [1-3].* | 4.[0-3].*)
    echo "error: bash $BASH_VERSION is too old: use Cloud Shell, or install bash 4.4 and GNU coreutils (macOS: brew install bash coreutils gnu-sed)" >&2
    exit 3
    ;;
esac
set -euo pipefail

INFRA=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname -- "$INFRA")
WORK=$(mktemp -d "${TMPDIR:-/tmp}/job-infra.XXXXXX")
DRY_RUN=${DRY_RUN:-}
trap 'rm -rf -- "$WORK"' EXIT

log() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

# Exit with 2 (bad argument, setting or spec) or 3 (bad environment). `job` uses the same codes.
usage_error() { # MESSAGE
  printf 'error: %s\n' "$1" >&2
  exit 2
}

fail() { # MESSAGE
  printf 'error: %s\n' "$1" >&2
  exit 3
}

# Print the comment at the top of a script as its help text.
show_help() { # FILE
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
}

# Settings, in order of precedence: flags, environment variables, the settings file, defaults.
SETTINGS=(PROJECT REGION ZONES MACHINE PROVISIONER SPOT BUCKET OUTPUT REPOSITORY IMAGE
  SERVICE_ACCOUNT SECRETS SELF_DELETE WAIT_SECONDS MAX_RUN_SECONDS MAX_ATTEMPTS BACKOFF_SECONDS
  POLL_SECONDS LEASE_SECONDS SETTLE_SECONDS NETWORK SUBNETWORK INTERNAL_IPS BOOT_DISK_GB
  CONTAINER_FLAGS)

load_settings() {
  local file=${INFRA_CONFIG:-$INFRA/config.env} line key value number=0
  if [[ -n ${INFRA_CONFIG:-} && ! -r $file ]]; then
    usage_error "INFRA_CONFIG=$file cannot be read"
  fi
  if [[ -r $file ]]; then
    while IFS= read -r line || [[ -n $line ]]; do
      number=$((number + 1))
      [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
      key=${line%%=*} value=${line#*=}
      if [[ $line != *=* || " ${SETTINGS[*]} " != *" $key "* ]]; then
        usage_error "$file:$number: '$line' is not a setting; write NAME=value with a name from config.env.example"
      fi
      if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
      [[ -n ${!key:-} ]] || printf -v "$key" %s "$value"
    done <"$file"
  fi
  : "${PROJECT:=${CLOUDSDK_CORE_PROJECT:-}}"
  [[ -n $PROJECT ]] || fail \
    "no project: copy infra/config.env.example to infra/config.env and set PROJECT there"
  # Only projects of organizations with a domain have a colon, as in example.com:lab.
  [[ $PROJECT =~ ^([a-z0-9][a-z0-9.-]*:)?[a-z][a-z0-9-]{1,28}[a-z0-9]$ ]] || usage_error \
    "PROJECT='$PROJECT': write the project's ID, not its name or number; gcloud projects list shows it"
  : "${ZONES:=us-central1-a us-west1-c us-west4-a us-south1-a}" # the cheapest first
  : "${REGION:=$(first_region "$ZONES")}"
  : "${MACHINE:=v5e-8}" "${PROVISIONER:=queued}" "${SPOT:=yes}" "${SELF_DELETE:=yes}"
  : "${BUCKET:=${PROJECT//[.:]/-}-jobs}" "${OUTPUT:=gs://$BUCKET/runs}"
  : "${REPOSITORY:=job}" "${IMAGE:=$REGION-docker.pkg.dev/${PROJECT//://}/$REPOSITORY/job:tpu}"
  : "${SERVICE_ACCOUNT:=$(account_email job-runner)}"
  : "${SECRETS=HF_TOKEN OPENROUTER_API_KEY}"
  : "${WAIT_SECONDS:=900}" "${MAX_RUN_SECONDS:=14400}" "${MAX_ATTEMPTS:=10}"
  : "${BACKOFF_SECONDS:=60}" "${POLL_SECONDS:=30}" "${LEASE_SECONDS:=180}" "${SETTLE_SECONDS:=60}"
  : "${NETWORK:=default}" "${SUBNETWORK:=}" "${INTERNAL_IPS:=no}" "${BOOT_DISK_GB:=200}"
  : "${CONTAINER_FLAGS=--net=host --user root --shm-size=16g --ulimit memlock=-1 --cap-add=SYS_RESOURCE}"
  check_settings
  export CLOUDSDK_CORE_PROJECT=$PROJECT CLOUDSDK_CORE_DISABLE_PROMPTS=1
  CONTROL=gs://$BUCKET/infra
}

first_region() { # ZONES
  local zone=${1%% *}
  printf '%s' "${zone%-*}"
}

# Print the address of a service account of the project.
account_email() { # NAME
  local project=${PROJECT##*:} domain=''
  [[ $PROJECT != *:* ]] || domain=.${PROJECT%%:*}
  printf '%s@%s%s.iam.gserviceaccount.com' "$1" "$project" "$domain"
}

check_settings() {
  local key
  for key in WAIT_SECONDS MAX_RUN_SECONDS MAX_ATTEMPTS LEASE_SECONDS BOOT_DISK_GB; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || usage_error "$key='${!key}': write an integer above 0"
  done
  for key in BACKOFF_SECONDS POLL_SECONDS SETTLE_SECONDS; do
    [[ ${!key} =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage_error "$key='${!key}': write a number of seconds"
  done
  for key in SPOT SELF_DELETE INTERNAL_IPS; do
    [[ ${!key} =~ ^(yes|no)$ ]] || usage_error "$key='${!key}': write yes or no"
  done
  for key in $ZONES; do
    [[ $key =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || usage_error \
      "ZONES: '$key' is not a zone; write zones like us-west4-a, separated by spaces"
  done
  [[ $BUCKET =~ ^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$ ]] || usage_error \
    "BUCKET='$BUCKET' is not a bucket's name: write 3 to 63 of a-z, 0-9, '-', '_' and '.', without gs://"
  [[ $SERVICE_ACCOUNT =~ ^[a-z0-9-]+@[a-z0-9.-]+\.gserviceaccount\.com$ ]] || usage_error \
    "SERVICE_ACCOUNT='$SERVICE_ACCOUNT': write an address like $(account_email job-runner)"
  [[ $IMAGE =~ ^[a-z0-9]+([a-z0-9./_:-]*[a-z0-9])?(:[A-Za-z0-9._-]+)?(@sha256:[a-f0-9]+)?$ ]] || usage_error \
    "IMAGE='$IMAGE' is not an image's name: write one like $REGION-docker.pkg.dev/project/job/job:tpu"
  [[ -r $INFRA/vm_$PROVISIONER.sh ]] || usage_error \
    "PROVISIONER='$PROVISIONER': write queued (queued resources) or gce (Compute Engine)"
}

use_provisioner() { # NAME
  # shellcheck source=/dev/null
  source "$INFRA/vm_$1.sh"
}

# Handle the flags that all scripts share. The other arguments go to ARGUMENTS.
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
  usage_error "$1: unknown argument '$2'; see infra/$1 --help"
}

need_gcloud() {
  [[ -n $DRY_RUN ]] || command -v gcloud >/dev/null || fail \
    "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
}

# Run the `job` command of this checkout, or the command in JOB.
job() {
  local command
  read -ra command <<<"${JOB:-uv run --quiet --project $ROOT job}"
  command -v "${command[0]}" >/dev/null || fail \
    "${command[0]} is not installed: pip install uv, or set JOB to the job command"
  "${command[@]}" "$@"
}

# Print values from a JSON file, one per line. A path looks like 0.machine_type. Null prints an empty line.
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

# gcloud_read runs a gcloud command that changes nothing. RESULT holds its output, and $WORK/stdout
# holds it byte for byte. On failure, ERROR holds the message on one line and ERROR_KIND its class.
# A dry run skips the command, prints it only if SHOW_READS=yes, and returns 1.
#
# gcloud_write runs a gcloud command that changes something. A dry run prints it instead.
RESULT='' ERROR='' ERROR_KIND='' SHOW_READS=''
gcloud_read() {
  local status=0
  RESULT='' ERROR='' ERROR_KIND=ok
  if [[ -n $DRY_RUN ]]; then
    [[ -z $SHOW_READS ]] || print_command gcloud "$@"
    return 1
  fi
  timeout "${GCLOUD_TIMEOUT:-120}" gcloud "$@" >"$WORK/stdout" 2>"$WORK/stderr" || status=$?
  RESULT=$(<"$WORK/stdout")
  ((status == 0)) || explain "$status"
  return "$status"
}

gcloud_write() {
  if [[ -n $DRY_RUN ]]; then
    print_command gcloud "$@"
    RESULT='' ERROR='' ERROR_KIND=ok
    return 0
  fi
  gcloud_read "$@"
}

# Set ERROR and ERROR_KIND from the stderr of gcloud.
explain() { # STATUS
  local text
  text=$(grep -v '^WARNING' "$WORK/stderr" | tr -s '\n\t ' ' ' \
    | sed 's/ This command is authenticated .*//; s/^ERROR: //' | cut -c1-600)
  ERROR=${text:-gcloud exited with status $1}
  if (($1 == 124)); then
    ERROR_KIND=unclear ERROR="gcloud did not respond within ${GCLOUD_TIMEOUT:-120} s"
    return
  fi
  classify "$ERROR"
}

# Set ERROR_KIND from a message of Google Cloud. Kinds: missing, exists, conflict (a failed
# precondition), quota, capacity, denied, login, invalid (no other request can work), busy (too many
# requests) and unclear (the call may have succeeded).
classify() { # MESSAGE
  case ${1,,} in
    *"per minute"* | *rate_limit* | *ratelimit* | *"rate limit"*) ERROR_KIND=busy ;;
    *quota*) ERROR_KIND=quota ;;
    *resource_exhausted* | *"no more capacity"* | *resource_pool_exhausted* | *stockout* | \
      *"not have enough resources"* | *insufficient*capacity* | *"currently unavailable in"*) ERROR_KIND=capacity ;;
    *already_exists* | *"already exists"* | *"already own it"* | *alreadyexists*) ERROR_KIND=exists ;;
    *constraints/* | *"org policy"* | *"organization policy"*) ERROR_KIND=invalid ;;
    *precondition* | *pre-condition* | *"error 412"*) ERROR_KIND=conflict ;;
    *not_found* | *"not found"* | *"error 404"* | *"matched no objects"* | *"does not exist"*) ERROR_KIND=missing ;;
    *unauthenticated* | *"reauthentication"* | *"error 401"* | *"credential"* | \
      *"active account"* | *"gcloud auth login"*) ERROR_KIND=login ;;
    *permission_denied* | *"does not have permission"* | *"error 403"* | *"permission "*) ERROR_KIND=denied ;;
    *invalid_argument* | *"error 400"* | *"invalid value"* | *unrecognized* | *"not allowed to use"* | \
      *"service account"* | *"runtime version"*) ERROR_KIND=invalid ;;
    *) ERROR_KIND=unclear ;;
  esac
}

# Exit after a gcloud failure, with a one-line message.
gcloud_fail() { # WHAT
  local hint=''
  case $ERROR_KIND in
    login) hint='; run: gcloud auth login' ;;
    denied) hint='; you need the roles listed in infra/README.md' ;;
  esac
  fail "$1: $ERROR$hint"
}

# Print the name of a run's machine, also used as its label: the run id in the characters Google
# Cloud allows, plus a digest, because a run in another bucket may have the same id.
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

# Parse the only argument of a script, a run. Set RUN and NAME, the name of its machine.
parse_run() { # SCRIPT ARGUMENT...
  local script=$1
  shift
  [[ ${1:-} != -* ]] || refuse_flag "$script" "$1"
  (($# == 1)) || usage_error "$script: expected one run; see infra/$script --help"
  RUN=${1##*/}
  [[ $RUN =~ ^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$ ]] || usage_error \
    "$script: '$1' is not a run id; infra/status.sh lists the runs"
  load_settings
  NAME=$(machine_name "$RUN")
  need_gcloud
}

no_such_run() {
  usage_error "there is no run '$RUN' in $CONTROL; infra/status.sh lists the runs"
}
