#!/usr/bin/env bash
# Build the image and push it to the project's repository. Print its name with its digest.
#
# Usage: infra/push_image.sh [--extra tpu|cpu|cuda] [--cloud-build] [--dry-run]
#
#   --extra        the hardware the image is for; default: tpu
#   --cloud-build  build with Cloud Build instead of local Docker

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

run() { # COMMAND...
  if [[ -n $DRY_RUN ]]; then
    print_command "$@"
    return
  fi
  "$@" >&2
}

main() {
  extra=tpu cloud_build=''
  common_flags "${BASH_SOURCE[0]}" "$@"
  set -- "${ARGUMENTS[@]}"
  while (($#)); do
    case $1 in
      --extra)
        extra=${2:-}
        [[ $extra =~ ^(tpu|cpu|cuda)$ ]] || usage_error "push_image.sh: --extra '$extra': write tpu, cpu or cuda"
        shift
        ;;
      --cloud-build) cloud_build=yes ;;
      *) refuse_flag push_image.sh "$1" ;;
    esac
    shift
  done
  load_settings
  need_gcloud
  [[ $IMAGE != *@* ]] || usage_error "IMAGE='$IMAGE' is a digest; set a tag to push, like $REGION-docker.pkg.dev/$PROJECT/$REPOSITORY/job:tpu"

  if [[ -n $cloud_build ]]; then
    cat >"$WORK/build.yaml" <<EOF
steps:
  - name: gcr.io/cloud-builders/docker
    entrypoint: bash
    args: [docker/build.sh, $extra, --tag, $IMAGE]
images: [$IMAGE]
serviceAccount: projects/$PROJECT/serviceAccounts/$(account_email job-builder)
options: {machineType: E2_HIGHCPU_8, logging: CLOUD_LOGGING_ONLY}
timeout: 3600s
EOF
    GCLOUD_TIMEOUT=3900 gcloud_write builds submit "$ROOT" "--config=$WORK/build.yaml" \
      "--gcs-source-staging-dir=gs://$BUCKET/source" --format=none \
      || gcloud_fail "Cloud Build"
  else
    command -v docker >/dev/null || [[ -n $DRY_RUN ]] \
      || fail "docker is not installed; install it, or use Cloud Build: infra/push_image.sh --cloud-build"
    # TPU machines are amd64, whatever the computer here is.
    run bash "$ROOT/docker/build.sh" "$extra" --platform linux/amd64 --tag "$IMAGE" || fail "the image build failed"
    if [[ -n $DRY_RUN ]]; then
      printf '+ gcloud auth print-access-token | docker login -u oauth2accesstoken --password-stdin https://%s\n' "${IMAGE%%/*}"
    else
      # A temporary Docker configuration, so the token does not stay in the user's own.
      DOCKER_CONFIG=$WORK
      export DOCKER_CONFIG
      gcloud auth print-access-token 2>"$WORK/stderr" \
        | docker login -u oauth2accesstoken --password-stdin "https://${IMAGE%%/*}" >/dev/null 2>"$WORK/login" \
        || fail "cannot log in to ${IMAGE%%/*}: $(cat "$WORK/stderr" "$WORK/login" | tr '\n' ' ' | cut -c1-300)"
    fi
    run docker push -q "$IMAGE" || fail "the image push failed"
  fi
  [[ -z $DRY_RUN ]] || exit 0
  gcloud_read artifacts docker images describe "$IMAGE" --format='value(image_summary.digest)' \
    || gcloud_fail "cannot look up the image $IMAGE"
  log "runs submitted with IMAGE=$IMAGE use this digest until the next push"
  printf '%s@%s\n' "${IMAGE%:*}" "$RESULT"
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
