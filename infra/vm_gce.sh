#!/usr/bin/env bash
# Machines as Compute Engine instances with TPUs (PROVISIONER=gce): one host, deleted by Compute
# Engine itself at the end of its time or when it is preempted. The functions are those that
# vm_queued.sh describes. To be sourced after state.sh.

# Variables are shared by the files of this folder.
# shellcheck disable=SC2034,SC2153,SC2154

VM=none VM_PROBLEM=''

vm_create() { # ZONE
  local -a flags=(--provisioning-model=STANDARD)
  [[ ${STATE[spot]} != yes ]] || flags=(--provisioning-model=SPOT)
  [[ -z ${STATE[subnetwork]:-} ]] || flags+=("--subnet=${STATE[subnetwork]}")
  change compute instances create "$NAME" "--zone=$1" "--machine-type=${STATE[machine_type]}" \
    "--image-family=${STATE[image_family]}" "--image-project=${STATE[image_project]}" \
    "--boot-disk-size=${STATE[boot_disk_gb]}GB" --maintenance-policy=TERMINATE \
    --no-restart-on-failure "--max-run-duration=$(remaining_seconds)s" \
    --instance-termination-action=DELETE "--network=${STATE[network]}" \
    "--service-account=${STATE[service_account]}" --scopes=cloud-platform \
    "--metadata-from-file=startup-script=$INFRA/startup.sh" "--metadata=$(vm_metadata "$1")" \
    "--labels=$(vm_labels)" "${flags[@]}" \
    || [[ $KIND == exists ]]
}

vm_look() { # ZONE
  VM=none VM_PROBLEM=''
  if ! ask compute instances describe "$NAME" "--zone=$1" --format='value(status)'; then
    [[ $KIND == missing ]]
    return
  fi
  VM=$(vm_state "$ANSWER")
}

vm_state() { # STATE
  case $1 in
    RUNNING) echo active ;;
    STOPPED | SUSPENDING | SUSPENDED | TERMINATED) echo dead ;;
    STOPPING) echo deleting ;;
    *) echo waiting ;;
  esac
}

vm_delete() { # ZONE
  change compute instances delete "$NAME" "--zone=$1" --quiet || [[ $KIND == missing ]]
}

vm_list() { # [NAME]
  local filter=labels.managed-by=job-infra
  [[ -z ${1:-} ]] || filter="name=$1"
  ask compute instances list "--filter=$filter" \
    --format='value[separator=" "](zone.basename(),name,status,metadata.items.filter("key:job-control").extract(value))'
  ANSWER=${ANSWER//[][\']/}
}

vm_offers() { # ZONE
  ask compute machine-types describe "${STATE[machine_type]}" "--zone=$1" --format='value(name)'
}

vm_path() { # ZONE
  printf 'compute projects/%s/zones/%s/instances/%s' "$PROJECT" "$1" "$NAME"
}
