#!/usr/bin/env bash
# Submits a job: checks the spec, says what it will take and cost, and orders the machine.
#
# Usage: infra/submit.sh SPEC [--set KEY=VALUE]... [--run-id ID] [--no-plan] [--wait] [--dry-run]
#
#   SPEC        a file, a gs:// URI, or the name of a shipped spec, like smoke
#   --set       replaces a value of the spec, as in `job run`; repeatable
#   --run-id    names the run; by default by the spec, so that the same spec goes on with its run
#   --no-plan   leaves the estimate out (it reads the model's configuration from the Hub)
#   --wait      watches the run to its end, like infra/supervise.sh
#   --dry-run   prints the commands that would change something, and changes nothing
#
# Submitting the same run again while it is at work changes nothing. Exit codes: 0 ordered (with
# --wait: done), 2 wrong spec or arguments, 3 wrong environment or refused, 4 the job failed,
# 75 stopped early.

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"
# shellcheck source=watch.sh
source "$INFRA/watch.sh"

main() {
  spec='' run_id='' wait='' plan=yes sets=()
  common_flags "${BASH_SOURCE[0]}" "$@"
  set -- "${ARGUMENTS[@]}"
  while (($#)); do
    case $1 in
      --set | --run-id)
        (($# > 1)) || misuse "submit.sh: $1 needs a value"
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
  [[ -n $spec ]] || misuse "submit.sh: name a spec; see infra/submit.sh --help"
  load_settings

  # The spec and the machine first: nothing of that needs the cloud.
  job validate "$spec" "${sets[@]}" --set "output=$OUTPUT" --portable --write "$WORK/spec.yaml" \
    >"$WORK/valid" || exit $?
  RUN=${run_id:-$(sed -n 's/.*its run id is //p' "$WORK/valid")}
  [[ $RUN =~ ^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$ ]] || misuse \
    "--run-id '$RUN': use up to 128 letters, digits, '.', '_' and '-', with a letter or digit first and last"
  NAME=$(machine_name "$RUN")
  read_order
  use_provisioner "$PROVISIONER"
  need_gcloud
  say "$spec is valid; the run is $OUTPUT/$RUN"
  if [[ -n $plan ]]; then
    job plan "$WORK/spec.yaml" --on "$MACHINE" >"$WORK/plan" || exit $?
    sed '1d' "$WORK/plan" >&2
    ! grep -q 'DOES NOT FIT' "$WORK/plan" || misuse \
      "the job does not fit on $MACHINE: see above for what to change, or leave the plan out (--no-plan)"
  fi
  price=${ORDER[usd_per_hour]}
  [[ $SPOT != yes ]] || price=${ORDER[spot_usd_per_hour]}
  say "$MACHINE costs ${price:-an unknown number of} USD an hour (list price of ${ORDER[prices_of]:-no date}), at most for $MAX_RUN_SECONDS s"

  again=''
  if read_state; then
    if [[ ${STATE[phase]} != ended ]]; then
      say "$RUN was submitted before and is at work (${STATE[phase]}); watch it: infra/supervise.sh $RUN"
      [[ -z $wait ]] || "$INFRA/supervise.sh" "$RUN"
      exit 0
    fi
    again=yes
  fi
  resolve_image
  # By its content, so that one submission never replaces the spec of another.
  SPEC_URI=$(run_folder)/spec-$(sha256sum <"$WORK/spec.yaml" | cut -c1-8).yaml
  new_submission "$again"
  change storage cp "$WORK/spec.yaml" "${STATE[spec]}" || stop_at "cannot write the spec to ${STATE[spec]}"
  if [[ -n $DRY_RUN ]]; then
    write_state
    vm_create "$(current_zone)"
    exit 0
  fi
  write_state || fail "$RUN was submitted by another at this moment; watch it: infra/supervise.sh $RUN"
  trap 'let_go; exit 130' INT TERM

  # Orders until a zone takes the order, each zone once; the watcher goes on from there.
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
  let_go
  [[ ${STATE[phase]} == run ]] || say "no zone has capacity yet; the watcher goes on asking"
  cat <<EOF
$OUTPUT/$RUN
Next:
  infra/supervise.sh $RUN          replace the machine when it is preempted, delete it at the end
  infra/status.sh $RUN             where it is
  infra/logs.sh $RUN --follow      what it says
  infra/fetch.sh $RUN DIR          the results, every checksum checked
  infra/cancel.sh $RUN             stop it and delete the machine
EOF
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
