#!/usr/bin/env bash
# Checks everything before money is spent: a line for each thing, with what to do where it is not
# in order. Changes nothing.
#
# Usage: infra/doctor.sh [SPEC] [--dry-run]
#
# Exit codes: 0 all is well, 2 the spec or a setting is wrong, 3 something is missing.

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"

good() { printf 'ok    %s\n' "$1"; }

bad() { # WHAT WAY-OUT
  PROBLEMS=$((PROBLEMS + 1))
  printf 'FAIL  %s; %s\n' "$1" "$2"
}

# A question: what it finds is in ANSWER; where it fails otherwise than by finding nothing, the
# line says so.
look() { # WHAT COMMAND...
  local what=$1
  shift
  ask "$@" && return 0
  [[ -n $DRY_RUN || $KIND == missing ]] || bad "$what" "$PROBLEM"
  [[ $KIND != login ]] || stop_at "not logged in"
  return 1
}

check_project() {
  local service
  if ! look "project $PROJECT" projects describe "$PROJECT" --format='value(lifecycleState)'; then
    [[ -n $DRY_RUN ]] || return 0
  fi
  [[ -n $DRY_RUN ]] || good "logged in; project $PROJECT"
  look "services" services list --enabled --format='value(config.name)' || return 0
  for service in tpu compute storage artifactregistry secretmanager logging; do
    [[ $ANSWER == *$service.googleapis.com* ]] \
      || { bad "the service $service.googleapis.com is off" "run infra/setup.sh" && return; }
  done
  good "services are on"
}

check_quota() {
  local service=tpu limit quotas zone
  [[ $PROVISIONER == queued ]] || service=compute
  if [[ $PROVISIONER == gce ]]; then
    good "quota of Compute Engine is not checked here: see IAM & Admin > Quotas for ${STATE[machine_type]}"
    return
  fi
  look "quota ${STATE[quota]}" beta quotas info describe "${STATE[quota]}" \
    "--service=$service.googleapis.com" "--project=$PROJECT" '--flatten=dimensionsInfos[]' \
    --format='value[separator="|"](dimensionsInfos.applicableLocations.list(),dimensionsInfos.details.value)' \
    || { [[ -n $DRY_RUN || $KIND != missing ]] || bad "there is no quota ${STATE[quota]}" "ask for it under IAM & Admin > Quotas"; return 0; }
  quotas=$ANSWER
  for zone in $ZONES; do
    # The line that names the zone, or the one that names none and holds for the rest.
    limit=$(awk -F'|' -v zone="$zone" '$1 ~ zone { print $2; found = 1; exit } $1 == "" { rest = $2 }
      END { if (!found) print rest }' <<<"$quotas")
    if [[ $limit == -1 ]] || ((${limit:-0} >= chips)); then
      good "quota in $zone: $limit chips, $MACHINE needs $chips"
    else
      bad "quota in $zone is ${limit:-0} chips, and $MACHINE needs $chips" "ask for more of ${STATE[quota]}, or take $zone out of ZONES"
    fi
  done
}

check_zones() {
  local zone
  for zone in $ZONES; do
    if vm_offers "$zone"; then
      good "$zone has $MACHINE"
    elif [[ -n $DRY_RUN ]]; then
      continue
    elif [[ $KIND == ok || $KIND == missing ]]; then
      bad "$zone has no $MACHINE" "take it out of ZONES"
    else
      bad "$zone" "$PROBLEM"
    fi
  done
}

check_image() {
  if [[ $IMAGE == *@sha256:* ]]; then
    good "image $IMAGE (by digest)"
  elif look "image $IMAGE" artifacts docker images describe "$IMAGE" --format='value(image_summary.digest)'; then
    good "image $IMAGE is $ANSWER"
  elif [[ $KIND == missing ]]; then
    bad "there is no image $IMAGE" "run infra/push_image.sh"
  fi
}

check_account() {
  local member=serviceAccount:$SERVICE_ACCOUNT
  if look "service account" iam service-accounts describe "$SERVICE_ACCOUNT" --format='value(email)'; then
    good "service account $SERVICE_ACCOUNT"
  elif [[ $KIND == missing ]]; then
    bad "there is no service account $SERVICE_ACCOUNT" "run infra/setup.sh"
  fi
  if look "bucket gs://$BUCKET" storage buckets get-iam-policy "gs://$BUCKET" \
    --flatten='bindings[].members' --format='value(bindings.members,bindings.role)'; then
    if grep -qE "^$member.roles/storage\.(objectUser|objectAdmin|admin)$" <<<"$ANSWER"; then
      good "gs://$BUCKET can be written by the job"
    else
      bad "gs://$BUCKET cannot be written by $SERVICE_ACCOUNT" "run infra/setup.sh"
    fi
  elif [[ $KIND == missing ]]; then
    bad "there is no bucket gs://$BUCKET" "run infra/setup.sh"
  fi
}

check_secrets() {
  local secret
  for secret in $SECRETS; do
    if look "secret $secret" secrets versions list "$(secret_name "$secret")" --filter=state=ENABLED \
      --limit=1 --format='value(name)' && [[ -n $ANSWER ]]; then
      good "secret $secret is stored"
    elif [[ -z $DRY_RUN && ($KIND == missing || $KIND == ok) ]]; then
      printf 'note  secret %s is not stored; where the spec needs it: infra/setup.sh --secret %s < FILE\n' "$secret" "$secret"
    fi
  done
}

main() {
  common_flags "${BASH_SOURCE[0]}" "$@"
  ((${#ARGUMENTS[@]} < 2)) || refuse_flag doctor.sh "${ARGUMENTS[1]}"
  spec=${ARGUMENTS[0]:-}
  [[ $spec != -* ]] || refuse_flag doctor.sh "$spec"
  SHOW_READS=yes
  load_settings
  need_gcloud
  read_order
  RUN=doctor
  use_provisioner "$PROVISIONER"
  GENERATION=0 IMAGE_DIGEST=$IMAGE SPEC_URI=""
  new_submission ''

  PROBLEMS=0

  if [[ -n $spec ]]; then
    job validate "$spec" --set "output=$OUTPUT" --portable >"$WORK/valid" || exit $?
    good "spec $(<"$WORK/valid")"
  fi
  chips=${ORDER[chips]}
  check_project
  check_quota
  check_zones
  check_image
  check_account
  check_secrets
  [[ -z $DRY_RUN ]] || exit 0
  ((PROBLEMS == 0)) || fail "$PROBLEMS things are not in order"
  say "all is well"
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
