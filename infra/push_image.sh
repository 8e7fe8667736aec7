#!/usr/bin/env bash
# Builds the image and pushes it to the project's repository; prints its name with its digest,
# which is what submissions run.
#
# Usage: infra/push_image.sh [--extra tpu|cpu] [--cloud-build] [--dry-run]
#
#   --extra        what the image is for; by default tpu
#   --cloud-build  builds with Cloud Build instead of the local Docker

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
        [[ $extra =~ ^(tpu|cpu|cuda)$ ]] || misuse "push_image.sh: --extra '$extra': write tpu, cpu or cuda"
        shift
        ;;
      --cloud-build) cloud_build=yes ;;
      *) refuse_flag push_image.sh "$1" ;;
    esac
    shift
  done
  load_settings
  need_gcloud
  [[ $IMAGE != *@* ]] || misuse "IMAGE='$IMAGE' is a digest; to push, name a tag, like $REGION-docker.pkg.dev/$PROJECT/$REPOSITORY/job:tpu"

  if [[ -n $cloud_build ]]; then
    cat >"$WORK/build.yaml" <<EOF
steps:
  - name: gcr.io/cloud-builders/docker
    entrypoint: bash
    args: [docker/build.sh, $extra, --tag, $IMAGE]
images: [$IMAGE]
options: {machineType: E2_HIGHCPU_8}
timeout: 3600s
EOF
    GCLOUD_TIMEOUT=3900 change builds submit "$ROOT" "--config=$WORK/build.yaml" --format=none \
      || stop_at "Cloud Build"
  else
    command -v docker >/dev/null || [[ -n $DRY_RUN ]] \
      || fail "docker is not installed; install it, or build in the cloud: infra/push_image.sh --cloud-build"
    run bash "$ROOT/docker/build.sh" "$extra" --tag "$IMAGE" || fail "the image was not built"
    if [[ -n $DRY_RUN ]]; then
      printf '+ gcloud auth print-access-token | docker login -u oauth2accesstoken --password-stdin https://%s\n' "${IMAGE%%/*}"
    else
      # A configuration of its own: the token is not left behind in the user's.
      DOCKER_CONFIG=$WORK
      export DOCKER_CONFIG
      gcloud auth print-access-token 2>"$WORK/stderr" \
        | docker login -u oauth2accesstoken --password-stdin "https://${IMAGE%%/*}" >/dev/null 2>"$WORK/login" \
        || fail "cannot log in to ${IMAGE%%/*}: $(cat "$WORK/stderr" "$WORK/login" | tr '\n' ' ' | cut -c1-300)"
    fi
    run docker push -q "$IMAGE" || fail "the image was not pushed"
  fi
  [[ -z $DRY_RUN ]] || exit 0
  ask artifacts docker images describe "$IMAGE" --format='value(image_summary.digest)' \
    || stop_at "cannot look up the image $IMAGE"
  say "submissions with IMAGE=$IMAGE run this digest until it is pushed again"
  printf '%s@%s\n' "${IMAGE%:*}" "$ANSWER"
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
