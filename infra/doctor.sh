#!/usr/bin/env bash
# Check the project before you spend money. Print one line for each check, and how to fix each
# problem. Changes nothing.
#
# Usage: infra/doctor.sh [SPEC] [--dry-run]
#
# Exit codes: 0 all checks passed, 2 the spec or a setting is wrong, 3 a check failed.

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"

good() { printf 'ok    %s\n' "$1"; }

bad() { # PROBLEM FIX
  PROBLEMS=$((PROBLEMS + 1))
  printf 'FAIL  %s; %s\n' "$1" "$2"
}

# Run a read-only gcloud command and set RESULT. Report any failure except "not found".
query() { # WHAT COMMAND...
  local what=$1
  shift
  gcloud_read "$@" && return 0
  [[ -n $DRY_RUN || $ERROR_KIND == missing ]] || bad "$what" "$ERROR"
  [[ $ERROR_KIND != login ]] || gcloud_fail "not logged in"
  return 1
}

check_project() {
  local service
  if ! query "project $PROJECT" projects describe "$PROJECT" --format='value(lifecycleState)'; then
    [[ -n $DRY_RUN ]] || return 0
  fi
  [[ -n $DRY_RUN ]] || good "logged in; project $PROJECT"
  query "services" services list --enabled --format='value(config.name)' || return 0
  for service in tpu compute storage artifactregistry secretmanager logging cloudbuild; do
    [[ $RESULT == *$service.googleapis.com* ]] \
      || { bad "the service $service.googleapis.com is not enabled" "run infra/setup.sh" && return; }
  done
  good "services are enabled"
}

check_quota() {
  local service=tpu limit quotas zone
  [[ $PROVISIONER == queued ]] || service=compute
  if [[ $PROVISIONER == gce ]]; then
    good "Compute Engine quota is not checked; see IAM & Admin > Quotas for ${STATE[machine_type]}"
    return
  fi
  query "quota ${STATE[quota]}" beta quotas info describe "${STATE[quota]}" \
    "--service=$service.googleapis.com" "--project=$PROJECT" '--flatten=dimensionsInfos[]' \
    --format='value[separator="|"](dimensionsInfos.applicableLocations.list(),dimensionsInfos.details.value)' \
    || { [[ -n $DRY_RUN || $ERROR_KIND != missing ]] || bad "there is no quota ${STATE[quota]}" "request it under IAM & Admin > Quotas"; return 0; }
  quotas=$RESULT
  for zone in $ZONES; do
    # The limit for this zone, or the default limit on the line without a zone.
    limit=$(awk -F'|' -v zone="$zone" '$1 ~ zone { print $2; matched = 1; exit } $1 == "" { rest = $2 }
      END { if (!matched) print rest }' <<<"$quotas")
    if [[ $limit == -1 ]] || ((${limit:-0} >= chips)); then
      good "quota in $zone: $limit chips, $MACHINE needs $chips"
    else
      bad "quota in $zone is ${limit:-0} chips, and $MACHINE needs $chips" "request more of ${STATE[quota]}, remove $zone from ZONES, or set a smaller MACHINE: a new project has 4 chips of v5e (v5e-4)"
    fi
  done
}

check_network() {
  local policy=constraints/compute.vmExternalIpAccess
  if query "network $NETWORK" compute networks describe "$NETWORK" --format='value(name)'; then
    good "network $NETWORK"
  elif [[ $ERROR_KIND == missing ]]; then
    bad "there is no network $NETWORK" "set NETWORK and SUBNETWORK, or run: gcloud compute networks create $NETWORK --subnet-mode=auto"
  fi
  [[ $INTERNAL_IPS == no ]] || return 0
  if ! gcloud_read resource-manager org-policies describe "$policy" --effective "--project=$PROJECT" \
    --format='value(listPolicy.allValues,listPolicy.allowedValues)'; then
    [[ -n $DRY_RUN ]] || printf 'note  cannot read the organization policy for external IPs: %s\n' "$ERROR"
  elif [[ -z ${RESULT//[[:space:]]/} || $RESULT == ALLOW* ]]; then
    good "machines may have external IPs"
  else
    bad "the organization policy $policy forbids external IPs" "set INTERNAL_IPS=yes and SUBNETWORK, with Private Google Access and Cloud NAT"
  fi
}

check_zones() {
  local zone
  for zone in $ZONES; do
    if vm_offers "$zone"; then
      good "$zone has $MACHINE"
    elif [[ -n $DRY_RUN ]]; then
      continue
    elif [[ $ERROR_KIND == ok || $ERROR_KIND == missing ]]; then
      bad "$zone has no $MACHINE" "remove it from ZONES"
    else
      bad "$zone" "$ERROR"
    fi
  done
}

check_image() {
  if [[ $IMAGE == *@sha256:* ]]; then
    good "image $IMAGE (by digest)"
  elif query "image $IMAGE" artifacts docker images describe "$IMAGE" --format='value(image_summary.digest)'; then
    good "image $IMAGE is $RESULT"
  elif [[ $ERROR_KIND == missing ]]; then
    bad "there is no image $IMAGE" "run infra/push_image.sh"
  fi
}

check_account() {
  local member=serviceAccount:$SERVICE_ACCOUNT retention hold pays location
  if query "service account" iam service-accounts describe "$SERVICE_ACCOUNT" --format='value(email)'; then
    good "service account $SERVICE_ACCOUNT"
  elif [[ $ERROR_KIND == missing ]]; then
    bad "there is no service account $SERVICE_ACCOUNT" "run infra/setup.sh"
  fi
  if query "bucket gs://$BUCKET" storage buckets get-iam-policy "gs://$BUCKET" \
    --flatten='bindings[].members' --format='value(bindings.members,bindings.role)'; then
    if grep -qE "^$member.roles/storage\.(objectUser|objectAdmin|admin)$" <<<"$RESULT"; then
      good "the job can write to gs://$BUCKET"
    else
      bad "$SERVICE_ACCOUNT cannot write to gs://$BUCKET" "run infra/setup.sh"
    fi
  elif [[ $ERROR_KIND == missing ]]; then
    bad "there is no bucket gs://$BUCKET" "run infra/setup.sh"
    return
  fi
  # The job replaces and deletes its own objects, and pays for nobody else's project.
  query "bucket gs://$BUCKET" storage buckets describe "gs://$BUCKET" --raw \
    --format='value[separator="|"](retentionPolicy.retentionPeriod,defaultEventBasedHold,billing.requesterPays,location)' || return 0
  IFS='|' read -r retention hold pays location <<<"$RESULT"
  [[ -z $retention ]] || bad "gs://$BUCKET has a retention policy of $retention s" "remove it, or set another BUCKET"
  [[ $hold != True ]] || bad "gs://$BUCKET holds every new object" "turn its default event-based hold off, or set another BUCKET"
  [[ $pays != True ]] || bad "gs://$BUCKET makes the requester pay" "turn that off, or set another BUCKET"
  check_location "${location,,}"
}

# Check that the machine may delete itself, or it would cost money until someone else deletes it.
check_deletion() {
  local role=projects/$PROJECT/roles/jobDeleteTpu
  [[ $PROVISIONER != gce ]] || role=projects/$PROJECT/roles/jobDeleteInstance
  [[ $SELF_DELETE == yes ]] || return 0
  query "roles in $PROJECT" projects get-iam-policy "$PROJECT" --flatten='bindings[].members' \
    --format='value(bindings.members,bindings.role)' || return 0
  ! grep -q "^serviceAccount:$SERVICE_ACCOUNT.$role\$" <<<"$RESULT" \
    || { good "a machine may delete itself" && return; }
  bad "$SERVICE_ACCOUNT does not have the role $role, so a machine cannot delete itself" "run infra/setup.sh"
}

# A location is a region, or US, EU, ASIA or a pair of regions, which have several.
check_location() { # LOCATION
  local zone
  local -A others=()
  [[ $1 == *-* ]] || return 0
  for zone in $ZONES; do
    [[ ${zone%-*} == "$1" ]] || others[${zone%-*}]=1
  done
  ((${#others[@]} == 0)) || printf 'note  gs://%s is in %s: Google bills what machines in other regions (%s) read from it, 0.02 to 0.14 USD per GB by distance\n' \
    "$BUCKET" "$1" "${!others[*]}"
}

check_secrets() {
  local secret
  for secret in $SECRETS; do
    if query "secret $secret" secrets versions list "$(secret_name "$secret")" --filter=state=ENABLED \
      --limit=1 --format='value(name)' && [[ -n $RESULT ]]; then
      good "secret $secret is stored"
    elif [[ -z $DRY_RUN && ($ERROR_KIND == missing || $ERROR_KIND == ok) ]]; then
      printf 'note  secret %s is not stored; if the spec needs it, run infra/setup.sh --secret %s < FILE\n' "$secret" "$secret"
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
  read_machine
  RUN=doctor
  use_provisioner "$PROVISIONER"
  GENERATION=0 IMAGE_DIGEST=$IMAGE SPEC_URI=""
  new_submission ''

  PROBLEMS=0

  if [[ -n $spec ]]; then
    job validate "$spec" --set "output=$OUTPUT" --portable >"$WORK/valid" || exit $?
    good "spec $(<"$WORK/valid")"
  fi
  chips=${MACHINE_INFO[chips]}
  check_project
  check_quota
  check_zones
  check_network
  check_image
  check_account
  check_deletion
  check_secrets
  [[ -z $DRY_RUN ]] || exit 0
  ((PROBLEMS == 0)) || fail "$PROBLEMS checks failed"
  log "all checks passed"
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
