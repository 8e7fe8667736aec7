#!/usr/bin/env bash
# Submit a job: check the spec, print what the run needs and costs, and create the machine.
#
# Usage: infra/submit.sh SPEC [--set KEY=VALUE]... [--run-id ID] [--no-plan] [--wait] [--dry-run]
#
#   SPEC        a file, a gs:// URI, or the name of a shipped spec, like smoke
#   --set       override a value of the spec, as in `job run`; repeatable
#   --run-id    the run id; by default it comes from the spec, so the same spec resumes its run
#   --no-plan   skip the estimate, which reads the model's configuration from the Hub
#   --wait      watch the run until it ends, like infra/supervise.sh
#   --dry-run   print the commands that would change something, and change nothing
#
# Submitting a run that is still active changes nothing. Exit codes: 0 created (with --wait: done),
# 2 wrong spec or arguments, 3 wrong environment or request refused, 4 the job failed, 75 stopped
# early.

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"
# shellcheck source=watch.sh
source "$INFRA/watch.sh"

# Print the price of the machine in the region that is tried first.
print_price() {
  local price=${MACHINE_INFO[usd_per_hour]} where='' region
  if [[ $SPOT == yes ]]; then
    region=$(first_region "$ZONES")
    price=$(json_values "$WORK/machine.json" "0.spot_usd_per_hour_by_region.$region")
    where=" spot in $region"
    [[ -n $price ]] || price=${MACHINE_INFO[spot_usd_per_hour]} where=" or more: spot in the cheapest region"
  fi
  log "$MACHINE costs ${price:-an unknown number of} USD per hour$where (list price of ${MACHINE_INFO[prices_of]:-an unknown date}), for at most $MAX_RUN_SECONDS s"
}

main() {
  spec='' run_id='' wait='' plan=yes sets=()
  common_flags "${BASH_SOURCE[0]}" "$@"
  set -- "${ARGUMENTS[@]}"
  while (($#)); do
    case $1 in
      --set | --run-id)
        (($# > 1)) || usage_error "submit.sh: $1 needs a value"
        if [[ $1 == --set ]]; then sets+=(--set "$2"); else run_id=$2; fi
        shift
        ;;
      --wait) wait=yes ;;
      --no-plan) plan='' ;;
      -*) refuse_flag submit.sh "$1" ;;
      *)
        [[ -z $spec ]] || refuse_flag submit.sh "$1"
        spec=$1
        ;;
    esac
    shift
  done
  [[ -n $spec ]] || usage_error "submit.sh: expected a spec; see infra/submit.sh --help"
  load_settings

  # Check the spec and the machine first, because that needs no cloud.
  job validate "$spec" "${sets[@]}" --set "output=$OUTPUT" --portable --write "$WORK/spec.yaml" \
    >"$WORK/valid" || exit $?
  RUN=${run_id:-$(sed -n 's/.*its run id is //p' "$WORK/valid")}
  [[ $RUN =~ ^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$ ]] || usage_error \
    "--run-id '$RUN': use up to 128 letters, digits, '.', '_' and '-', with a letter or digit first and last"
  NAME=$(machine_name "$RUN")
  read_machine
  use_provisioner "$PROVISIONER"
  need_gcloud
  log "$spec is valid; run $OUTPUT/$RUN"
  if [[ -n $plan ]]; then
    job plan "$WORK/spec.yaml" --on "$MACHINE" >"$WORK/plan" || exit $?
    sed '1d' "$WORK/plan" >&2
    ! grep -q 'DOES NOT FIT' "$WORK/plan" || usage_error \
      "the job does not fit on $MACHINE; change the spec as described above, or skip this check with --no-plan"
  fi
  print_price

  # The watcher replaces a machine whose log is silent for longer than the job allows, and at least for
  # half an hour, because a pull of the image writes nothing.
  STALL_SECONDS=$(awk '$1 == "stall_minutes:" { none = $2 == "null"; stall = int($2 * 60 + 1) }
    END { if (!none) print (stall > 1801 ? stall : 1801) }' "$WORK/spec.yaml")

  again=''
  if read_state; then
    if [[ ${STATE[phase]} != ended ]]; then
      log "$RUN was submitted before and is active (phase ${STATE[phase]}); to watch it, run infra/supervise.sh $RUN"
      [[ -z $wait ]] || "$INFRA/supervise.sh" "$RUN"
      exit 0
    fi
    again=yes
  fi
  resolve_image
  # The digest in the name keeps one submission from replacing the spec of another.
  SPEC_URI=$(run_folder)/spec-$(sha256sum <"$WORK/spec.yaml" | cut -c1-8).yaml
  new_submission "$again"
  gcloud_write storage cp "$WORK/spec.yaml" "${STATE[spec]}" || gcloud_fail "cannot write the spec to ${STATE[spec]}"
  if [[ -n $DRY_RUN ]]; then
    write_state
    vm_create "$(current_zone)"
    exit 0
  fi
  write_state || fail "someone else just submitted $RUN; to watch it, run infra/supervise.sh $RUN"
  trap 'release_lease; exit 130' INT TERM

  # Try each zone once, until one accepts the request. The watcher continues from there.
  until [[ ${STATE[phase]} == run || ${STATE[phase]} == ended ]] \
    || { [[ ${STATE[phase]} == create ]] && ((STATE[failures] >= $(zones_count))); }; do
    watch_step
  done
  if [[ ${STATE[phase]} == ended && ${STATE[outcome]} != "done" ]]; then
    printf 'error: %s\n' "${STATE[reason]}" >&2
    exit "${STATE[exit]}"
  fi
  if [[ -n $wait ]]; then
    watch_to_end
    exit $?
  fi
  release_lease
  [[ ${STATE[phase]} == run ]] || log "no zone has capacity yet; the watcher keeps trying"
  cat <<EOF
$OUTPUT/$RUN
Next:
  infra/supervise.sh $RUN          replace the machine if it is preempted, delete it at the end
  infra/status.sh $RUN             show the status
  infra/logs.sh $RUN --follow      follow the log
  infra/fetch.sh $RUN DIR          download the results and verify them
  infra/cancel.sh $RUN             stop the run and delete the machine
EOF
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
