#!/usr/bin/env bash
# Prepares a project, once; run again, it changes only what is missing: services, the bucket, the
# image repository, the job's service account with its roles, and room for the secrets.
#
# Usage: infra/setup.sh [--dry-run]
#        infra/setup.sh --secret NAME [--dry-run] < FILE
#
#   --secret    stores a secret, HF_TOKEN or OPENROUTER_API_KEY, from standard input:
#                 infra/setup.sh --secret HF_TOKEN < token.txt
#               On a terminal it asks, and does not show what is typed.

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

told() { [[ -n $DRY_RUN ]] || say "$1"; }

# Makes what a question does not find.
ensure() { # WHAT QUESTION... -- COMMAND...
  local what=$1 question=()
  shift
  while [[ $1 != -- ]]; do question+=("$1") && shift; done
  shift
  if ask "${question[@]}"; then
    told "$what: there already"
    return
  fi
  [[ -n $DRY_RUN || $KIND == missing || $KIND == denied ]] || stop_at "$what"
  change "$@" || [[ $KIND == exists ]] || stop_at "$what"
  told "$what: made"
}

grant() { # WHAT COMMAND...
  local what=$1
  shift
  change "$@" "--member=$MEMBER" --format=none || stop_at "$what"
  told "$what"
}

ensure_secret() { # VARIABLE
  local name
  name=$(secret_name "$1")
  ensure "secret $name" secrets describe "$name" -- \
    secrets create "$name" --replication-policy=automatic
  grant "the job may read $name" secrets add-iam-policy-binding "$name" \
    --role=roles/secretmanager.secretAccessor
}

main() {
  secret=''
  common_flags "${BASH_SOURCE[0]}" "$@"
  set -- "${ARGUMENTS[@]}"
  while (($#)); do
    case $1 in
      --secret)
        secret=${2:-}
        [[ $secret =~ ^[A-Z][A-Z0-9_]*$ ]] || misuse "setup.sh: --secret needs a name like HF_TOKEN; the value comes from standard input"
        shift
        ;;
      *) refuse_flag setup.sh "$1" ;;
    esac
    shift
  done
  load_settings
  need_gcloud
  MEMBER=serviceAccount:$SERVICE_ACCOUNT

  if [[ -n $secret ]]; then
    if [[ -t 0 ]]; then
      printf '%s: ' "$secret" >&2
      read -rs value && echo >&2
    else
      value=$(cat)
    fi
    [[ -n $value || -n $DRY_RUN ]] || misuse "setup.sh: nothing came on standard input for $secret"
    ensure_secret "$secret"
    # From a here-string to standard input: in no argument and no file.
    change secrets versions add "$(secret_name "$secret")" --data-file=- --format=none \
      < <(printf %s "$value") || stop_at "secret $secret"
    told "$secret is stored"
    exit 0
  fi

  told "project $PROJECT, region $REGION"
  change services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com \
    artifactregistry.googleapis.com secretmanager.googleapis.com logging.googleapis.com \
    iam.googleapis.com cloudquotas.googleapis.com || stop_at "services"
  told "services: enabled"

  ensure "bucket gs://$BUCKET" storage buckets describe "gs://$BUCKET" --format='value(name)' -- \
    storage buckets create "gs://$BUCKET" "--location=$REGION" --uniform-bucket-level-access \
    --public-access-prevention
  # Checkpoints are of use while a run is at work; logs of machines for a while longer.
  cat >"$WORK/lifecycle.json" <<'EOF'
{"rule": [
  {"action": {"type": "Delete"}, "condition": {"age": 30, "matchesSuffix": [".checkpoint.safetensors"]}},
  {"action": {"type": "Delete"}, "condition": {"age": 90, "matchesPrefix": ["infra/"], "matchesSuffix": [".log"]}},
  {"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": 7}}
]}
EOF
  change storage buckets update "gs://$BUCKET" "--lifecycle-file=$WORK/lifecycle.json" \
    --uniform-bucket-level-access --public-access-prevention || stop_at "bucket gs://$BUCKET"
  told "bucket gs://$BUCKET: private, old checkpoints and logs are deleted"

  ensure "image repository $REPOSITORY" artifacts repositories describe "$REPOSITORY" \
    "--location=$REGION" --format='value(name)' -- \
    artifacts repositories create "$REPOSITORY" "--location=$REGION" --repository-format=docker

  ensure "service account $SERVICE_ACCOUNT" iam service-accounts describe "$SERVICE_ACCOUNT" \
    --format='value(email)' -- \
    iam service-accounts create "${SERVICE_ACCOUNT%%@*}" --display-name="Runs jobs on TPU VMs"

  grant "the job may write objects in gs://$BUCKET" storage buckets add-iam-policy-binding \
    "gs://$BUCKET" --role=roles/storage.objectUser
  grant "the job may pull images" artifacts repositories add-iam-policy-binding "$REPOSITORY" \
    "--location=$REGION" --role=roles/artifactregistry.reader
  grant "the job may write logs" projects add-iam-policy-binding "$PROJECT" \
    --role=roles/logging.logWriter --condition=None
  if [[ $SELF_DELETE == yes && $PROVISIONER == queued ]]; then
    grant "a machine may delete itself" projects add-iam-policy-binding "$PROJECT" \
      --role=roles/tpu.admin --condition=None
  elif [[ $SELF_DELETE == yes ]]; then
    ensure "role jobSelfDelete" iam roles describe jobSelfDelete "--project=$PROJECT" \
      --format='value(name)' -- \
      iam roles create jobSelfDelete "--project=$PROJECT" --title="Delete TPU machines" --stage=GA \
      --permissions=compute.instances.delete
    grant "a machine may delete itself" projects add-iam-policy-binding "$PROJECT" \
      "--role=projects/$PROJECT/roles/jobSelfDelete" --condition=None
  fi
  for secret in $SECRETS; do ensure_secret "$secret"; done
  cat <<EOF
Next:
  infra/setup.sh --secret HF_TOKEN < FILE     for each secret you have ($SECRETS)
  infra/push_image.sh                         build and push the image
  infra/doctor.sh SPEC                        check everything
EOF
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
