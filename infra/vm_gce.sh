#!/usr/bin/env bash
# Machines as Compute Engine instances with TPUs (PROVISIONER=gce): one host. Compute Engine deletes
# the machine at its maximum run time and on preemption. vm_queued.sh describes the functions.
# Source this file after state.sh.

# The scripts in this folder share variables.
# shellcheck disable=SC2034,SC2153,SC2154

VM=none VM_ERROR=''

vm_create() { # ZONE
  local -a flags=(--provisioning-model=STANDARD)
  [[ ${STATE[spot]} != yes ]] || flags=(--provisioning-model=SPOT)
  [[ -z ${STATE[subnetwork]:-} ]] || flags+=("--subnet=${STATE[subnetwork]}")
  [[ ${STATE[internal_ips]:-no} == no ]] || flags+=(--no-address)
  gcloud_write compute instances create "$NAME" "--zone=$1" "--machine-type=${STATE[machine_type]}" \
    "--image-family=${STATE[image_family]}" "--image-project=${STATE[image_project]}" \
    "--boot-disk-size=${STATE[boot_disk_gb]}GB" --maintenance-policy=TERMINATE \
    --no-restart-on-failure "--max-run-duration=$(remaining_seconds)s" \
    --instance-termination-action=DELETE "--network=${STATE[network]}" \
    "--service-account=${STATE[service_account]}" --scopes=cloud-platform \
    "--metadata-from-file=startup-script=$INFRA/startup.sh" "--metadata=$(vm_metadata "$1")" \
    "--labels=$(vm_labels)" "${flags[@]}" \
    || [[ $ERROR_KIND == exists ]]
}

vm_describe() { # ZONE
  VM=none VM_ERROR=''
  if ! gcloud_read compute instances describe "$NAME" "--zone=$1" --format='value(status)'; then
    [[ $ERROR_KIND == missing ]]
    return
  fi
  VM=$(vm_state "$RESULT")
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
  gcloud_write compute instances delete "$NAME" "--zone=$1" --quiet || [[ $ERROR_KIND == missing ]]
}

vm_list() { # [NAME]
  local filter=labels.managed-by=job-infra
  [[ -z ${1:-} ]] || filter="name=$1"
  gcloud_read compute instances list "--filter=$filter" \
    --format='value[separator=" "](zone.basename(),name,status,metadata.items.filter("key:job-control").extract(value))'
  RESULT=${RESULT//[][\']/}
}

vm_offers() { # ZONE
  gcloud_read compute machine-types describe "${STATE[machine_type]}" "--zone=$1" --format='value(name)'
}

vm_delete_path() { # ZONE
  printf 'compute projects/%s/zones/%s/instances/%s' "$PROJECT" "$1" "$NAME"
}
