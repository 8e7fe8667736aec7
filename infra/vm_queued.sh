#!/usr/bin/env bash
# Machines as TPU queued resources (PROVISIONER=queued). Source this file after state.sh.
#
# A provisioner (this file or vm_gce.sh) defines these functions for the machine NAME of the run in
# STATE. On failure they set ERROR and ERROR_KIND.
#   vm_create ZONE       request the machine; succeeds if it was requested or already exists
#   vm_describe ZONE     set VM to none, waiting, active, dead or deleting, and VM_ERROR to a reason
#   vm_delete ZONE       start deleting the machine; succeeds if it does not exist
#   vm_list [NAME]       set RESULT to "zone name state folder" lines: all job machines, or one name
#   vm_state STATE       print the word above (active, dead, ...) for a state of the API
#   vm_offers ZONE       return whether the zone offers the machine type
#   vm_delete_path ZONE  print the API and the path with which the machine can delete itself

# The scripts in this folder share variables.
# shellcheck disable=SC2034,SC2153,SC2154

VM=none VM_ERROR=''

vm_create() { # ZONE
  local -a flags=()
  [[ ${STATE[spot]} != yes ]] || flags+=(--spot)
  [[ -z ${STATE[subnetwork]:-} ]] || flags+=("--subnetwork=${STATE[subnetwork]}")
  [[ ${STATE[internal_ips]:-no} == no ]] || flags+=(--internal-ips)
  gcloud_write compute tpus queued-resources create "$NAME" "--node-id=$NAME" "--zone=$1" \
    "--accelerator-type=${STATE[accelerator_type]}" "--runtime-version=${STATE[runtime_version]}" \
    "--network=${STATE[network]}" "--service-account=${STATE[service_account]}" \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    "--metadata-from-file=startup-script=$INFRA/startup.sh" "--metadata=$(vm_metadata "$1")" \
    "--labels=$(vm_labels)" "--valid-until-duration=${STATE[wait_seconds]}s" "${flags[@]}" --async \
    || [[ $ERROR_KIND == exists ]]
}

vm_describe() { # ZONE
  VM=none VM_ERROR=''
  if ! gcloud_read compute tpus queued-resources describe "$NAME" "--zone=$1" \
    --format='value[separator="|"](state.state,state.failedData.error.message)'; then
    [[ $ERROR_KIND == missing ]]
    return
  fi
  VM=$(vm_state "${RESULT%%|*}") VM_ERROR=${RESULT#*|}
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
  gcloud_write compute tpus queued-resources delete "$NAME" "--zone=$1" --force --async --quiet \
    || [[ $ERROR_KIND == missing ]]
}

vm_list() { # [NAME]
  local filter=tpu.nodeSpec.node.labels.managed-by=job-infra
  [[ -z ${1:-} ]] || filter="name~/$1\$"
  gcloud_read compute tpus queued-resources list --zone=- "--filter=$filter" \
    --format='value[separator=" "](name.segment(3),name.segment(5),state.state,tpu.nodeSpec[0].node.metadata.job-control)'
}

vm_offers() { # ZONE
  gcloud_read compute tpus accelerator-types list "--zone=$1" "--filter=type=${STATE[accelerator_type]}" \
    --format='value(type)' && [[ -n $RESULT ]]
}

vm_delete_path() { # ZONE
  printf 'tpu v2/projects/%s/locations/%s/queuedResources/%s?force=true' "$PROJECT" "$1" "$NAME"
}
