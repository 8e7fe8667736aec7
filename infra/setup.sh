#!/usr/bin/env bash
# Set up a project, once: services, the bucket, the image repository, the job's service account and
# its roles, and empty secrets. It is safe to run again: it creates only what is missing.
#
# Usage: infra/setup.sh [--dry-run]
#        infra/setup.sh --secret NAME [--dry-run] < FILE
#
#   --secret    store a secret, HF_TOKEN or OPENROUTER_API_KEY, from standard input:
#                 infra/setup.sh --secret HF_TOKEN < token.txt
#               On a terminal, the script prompts for the value and hides it.

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

report() { [[ -n $DRY_RUN ]] || log "$1"; }

# Create a resource unless the first command shows that it exists.
ensure() { # WHAT READ-COMMAND... -- CREATE-COMMAND...
  local what=$1 read_command=()
  shift
  while [[ $1 != -- ]]; do read_command+=("$1") && shift; done
  shift
  if gcloud_read "${read_command[@]}"; then
    report "$what: already exists"
    return
  fi
  [[ -n $DRY_RUN || $ERROR_KIND == missing || $ERROR_KIND == denied ]] || gcloud_fail "$what"
  gcloud_write "$@" || [[ $ERROR_KIND == exists ]] || gcloud_fail "$what"
  report "$what: created"
}

# Grant a role to MEMBER. It takes some time until other services know a new account.
grant() { # WHAT COMMAND...
  local what=$1 left=10
  shift
  until gcloud_write "$@" "--member=$MEMBER" --format=none; do
    [[ ${ERROR,,} =~ "does not exist"|invalid && $left != 0 ]] || gcloud_fail "$what"
    ((left < 10)) || log "waiting until ${MEMBER#*:} is known: $ERROR"
    left=$((left - 1))
    sleep "$POLL_SECONDS"
  done
  report "$what"
}

ensure_secret() { # VARIABLE
  local name
  name=$(secret_name "$1")
  ensure "secret $name" secrets describe "$name" -- \
    secrets create "$name" --replication-policy=automatic
  grant "the job may read $name" secrets add-iam-policy-binding "$name" \
    --role=roles/secretmanager.secretAccessor
}

# Give Cloud Build an account that may only read the uploaded source, write images, and write logs.
set_up_builds() {
  local builder
  builder=$(account_email job-builder) MEMBER=serviceAccount:$(account_email job-builder)
  ensure "service account $builder" iam service-accounts describe "$builder" --format='value(email)' -- \
    iam service-accounts create job-builder --display-name="Builds images in Cloud Build"
  grant "builds may read gs://$BUCKET" storage buckets add-iam-policy-binding "gs://$BUCKET" \
    --role=roles/storage.objectViewer
  grant "builds may write images" artifacts repositories add-iam-policy-binding "$REPOSITORY" \
    "--location=$REGION" --role=roles/artifactregistry.writer
  grant "builds may write logs" projects add-iam-policy-binding "$PROJECT" \
    --role=roles/logging.logWriter --condition=None
}

main() {
  secret=''
  common_flags "${BASH_SOURCE[0]}" "$@"
  set -- "${ARGUMENTS[@]}"
  while (($#)); do
    case $1 in
      --secret)
        secret=${2:-}
        [[ $secret =~ ^[A-Z][A-Z0-9_]*$ ]] || usage_error "setup.sh: --secret needs a name like HF_TOKEN; the value comes from standard input"
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
    [[ -n $value || -n $DRY_RUN ]] || usage_error "setup.sh: standard input for $secret is empty"
    ensure_secret "$secret"
    # The secret goes through a pipe, so it is in no argument and no file.
    gcloud_write secrets versions add "$(secret_name "$secret")" --data-file=- --format=none \
      < <(printf %s "$value") || gcloud_fail "secret $secret"
    report "$secret is stored"
    exit 0
  fi

  report "project $PROJECT, region $REGION"
  gcloud_write services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com \
    artifactregistry.googleapis.com secretmanager.googleapis.com logging.googleapis.com \
    iam.googleapis.com cloudquotas.googleapis.com cloudbuild.googleapis.com || gcloud_fail "services"
  report "services: enabled"

  ensure "bucket gs://$BUCKET" storage buckets describe "gs://$BUCKET" --format='value(name)' -- \
    storage buckets create "gs://$BUCKET" "--location=$REGION" --uniform-bucket-level-access \
    --public-access-prevention
  # Only an unfinished run needs its checkpoints. Machine logs stay useful for longer.
  cat >"$WORK/lifecycle.json" <<'EOF'
{"rule": [
  {"action": {"type": "Delete"}, "condition": {"age": 30, "matchesSuffix": [".checkpoint.safetensors"]}},
  {"action": {"type": "Delete"}, "condition": {"age": 90, "matchesPrefix": ["infra/"], "matchesSuffix": [".log"]}},
  {"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": 7}}
]}
EOF
  gcloud_write storage buckets update "gs://$BUCKET" "--lifecycle-file=$WORK/lifecycle.json" \
    --uniform-bucket-level-access --public-access-prevention || gcloud_fail "bucket gs://$BUCKET"
  report "bucket gs://$BUCKET: private, deletes old checkpoints and logs"

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
  # Both roles, because PROVISIONER and SELF_DELETE may change before the next submission. The TPU API
  # has no permissions of its own for queued resources; it asks for those on their nodes.
  for role in jobDeleteTpu=tpu.nodes.delete,tpu.nodes.get jobDeleteInstance=compute.instances.delete; do
    ensure "role ${role%%=*}" iam roles describe "${role%%=*}" "--project=$PROJECT" --format='value(name)' -- \
      iam roles create "${role%%=*}" "--project=$PROJECT" --title="Delete TPU machines" --stage=GA \
      "--permissions=${role#*=}"
    grant "a machine may delete itself (${role%%=*})" projects add-iam-policy-binding "$PROJECT" \
      "--role=projects/$PROJECT/roles/${role%%=*}" --condition=None
  done
  for secret in $SECRETS; do ensure_secret "$secret"; done
  set_up_builds
  cat <<EOF
Next:
  infra/setup.sh --secret HF_TOKEN < FILE     store each secret you have ($SECRETS)
  infra/push_image.sh                         build and push the image
  infra/doctor.sh SPEC                        check the project and the spec
EOF
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
