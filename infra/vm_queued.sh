#!/usr/bin/env bash
# Machines as TPU queued resources (PROVISIONER=queued). To be sourced after state.sh.
#
# What a provisioner is, here and in vm_gce.sh, of the run in STATE and its machine NAME:
#   vm_create ZONE       order the machine; 0: ordered, or there already; else KIND and PROBLEM say why
#   vm_look ZONE         sets VM to none, waiting, active, dead or deleting, and VM_PROBLEM to a reason
#   vm_delete ZONE       begin to delete it; 0: begun, or not there
#   vm_list [NAME]       lines of "zone name state folder" of all machines of jobs, or of one name
#   vm_state WORD        one of the words above for a state of the API
#   vm_offers ZONE       whether the zone has the machine
#   vm_path ZONE         the API and the path by which the machine can delete itself

# Variables are shared by the files of this folder.
# shellcheck disable=SC2034,SC2153,SC2154

VM=none VM_PROBLEM=''

vm_create() { # ZONE
  local -a flags=()
  [[ ${STATE[spot]} != yes ]] || flags+=(--spot)
  [[ -z ${STATE[subnetwork]:-} ]] || flags+=("--subnetwork=${STATE[subnetwork]}")
  change compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--zone=$1" \
    "--accelerator-type=${STATE[accelerator_type]}" "--runtime-version=${STATE[runtime_version]}" \
    "--network=${STATE[network]}" "--service-account=${STATE[service_account]}" \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    "--metadata-from-file=startup-script=$INFRA/startup.sh" "--metadata=$(vm_metadata "$1")" \
    "--labels=$(vm_labels)" "--valid-until-duration=${STATE[wait_seconds]}s" "${flags[@]}" --async \
    || [[ $KIND == exists ]]
}

vm_look() { # ZONE
  VM=none VM_PROBLEM=''
  if ! ask compute tpus queued-resources describe "$NAME" "--zone=$1" \
    --format='value[separator="|"](state.state,state.failedData.error.message)'; then
    [[ $KIND == missing ]]
    return
  fi
  VM=$(vm_state "${ANSWER%%|*}") VM_PROBLEM=${ANSWER#*|}
}

vm_state() { # STATE
  case $1 in
    ACTIVE) echo active ;;
    SUSPENDING | SUSPENDED | FAILED) echo dead ;;
    DELETING) echo deleting ;;
    *) echo waiting ;;
  esac
}

vm_delete() { # ZONE
  change compute tpus queued-resources delete "$NAME" "--zone=$1" --force --async --quiet \
    || [[ $KIND == missing ]]
}

vm_list() { # [NAME]
  local filter=tpu.nodeSpec.node.labels.managed-by=job-infra
  [[ -z ${1:-} ]] || filter="name~/$1\$"
  ask compute tpus queued-resources list --zone=- "--filter=$filter" \
    --format='value[separator=" "](name.segment(3),name.segment(5),state.state,tpu.nodeSpec[0].node.metadata.job-control)'
}

vm_offers() { # ZONE
  ask compute tpus accelerator-types list "--zone=$1" "--filter=type=${STATE[accelerator_type]}" \
    --format='value(type)' && [[ -n $ANSWER ]]
}

vm_path() { # ZONE
  printf 'tpu v2/projects/%s/locations/%s/queuedResources/%s?force=true' "$PROJECT" "$1" "$NAME"
}
