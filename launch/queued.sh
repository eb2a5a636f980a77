#!/usr/bin/env bash
# Trains on spot TPUs by a queued resource, and asks again when they are taken away: launch/queued.sh COMMAND --name=… --zone=… --project=… [--dry_run]
#   run --type=v5p-128 --version=v2-alpha-tpuv5 -- --config=… --workdir=gs://… [training flags]
#       asks for the TPUs, waits for them, copies, sets up, trains, and watches until the training ends. When the TPUs are taken
#       away it deletes its queued resource, asks again and resumes from the last checkpoint; when a notice of the cloud stopped the
#       training and the TPUs stay, it starts it again on these.
#         --max_retries=10            how often it asks or starts again
#         --yes                       may delete the queued resource that it made itself without asking; without it, each time it asks
#         --adopt                     take over the queued resource of an earlier call, as if this one had made it
#         --valid_until_duration=6h   give up waiting in the queue after this time
#         --network=… --subnetwork=…
#   status      state of the queued resource, of its TPU, and of the training on every worker
#   delete [--yes]      asks for the name first
# The TPU VM has the same name: tpu_vm.sh logs, status and stop work on it. Interrupting `run` leaves TPUs and training as they are.
# Exit status of run: that of the training (143: stopped by tpu_vm.sh stop, and it saved), or 1 after --max_retries, a deletion that was not
# confirmed, or when a worker does not say how it ended.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

name="" zone="" project="" type="" version="" network="" subnetwork="" valid_until_duration="" adopt=""
max_retries=10
POLL=60      # seconds between two looks
PATIENCE=5   # looks in a row at a training that does not run, or does not answer, on TPUs that are said to be active
command=${1:-}
[[ $command =~ ^(run|status|delete)$ ]] || usage "name a command first: $PROGRAM {run,status,delete} --name=… --zone=… --project=…"
shift
parse "name zone project type version network subnetwork valid_until_duration max_retries" "adopt yes" "$@"
need name my-run zone us-east5-a project my-project
need_number max_retries 0
need_tools gcloud
WHERE=("$name" --zone="$zone" --project="$project")

tpu_vm() { # COMMAND ARGUMENT…
  bash "$ROOT/launch/tpu_vm.sh" "$1" --name="$name" --zone="$zone" --project="$project" ${dry_run:+--dry_run} "${@:2}"
}

create() {
  run_retrying gcloud compute tpus queued-resources create "${WHERE[@]}" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$version" --spot ${network:+--network="$network"} ${subnetwork:+--subnetwork="$subnetwork"} \
    ${valid_until_duration:+--valid-until-duration="$valid_until_duration"}
}

delete() {
  confirm "the queued resource $name in $zone of $project with its TPUs and their disks" "$name"
  run_retrying gcloud compute tpus queued-resources delete "${WHERE[@]}" --force --quiet
}

state_of_resource() { # VARIABLE
  ask "$1" ACTIVE gcloud compute tpus queued-resources describe "${WHERE[@]}" --format="value(state.state)"
}

# Sets state to ACTIVE, or to SUSPENDED or FAILED: then the TPUs are gone, or never came.
wait_until_active() {
  local said=""
  while :; do
    state_of_resource state
    case $state in
      ACTIVE | SUSPENDED | FAILED) return ;;
      CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | SUSPENDING) ;;
      *) fail 1 "queued resource $name is ${state:-in no state}; see: $PROGRAM status" ;;
    esac
    [ "$state" = "$said" ] || note "$name: $state"
    said=$state
    sleep "$POLL"
  done
}

# Sets outcome to what the workers' lines say when none runs: 0 when all have finished, stopped when the others saved and stopped before the last
# step, else the worst of what failed. One that does not say how it ended has failed, as has the answer that holds no worker.
judge() { # LINES
  local states failed
  states=$(sed -n 's/^worker .*: //p' <<<"$1")
  failed=$(grep -vx -e "ended 0" -e "ended $NOT_FINISHED" <<<"$states" | sed -e 's/^ended \([0-9][0-9]*\)$/\1/' -e t -e "s/.*/$prepared/" | sort -n | tail -n 1) || true
  outcome=0
  if [ -n "$failed" ]; then
    outcome=$failed
  elif grep -qx "ended $NOT_FINISHED" <<<"$states"; then
    outcome=stopped
  fi
}

# Watches the training. Sets outcome to lost when the TPUs are gone, else to what judge makes of it.
watch() {
  local trouble=0 lines
  while :; do
    wait_until_active
    outcome=lost
    [ "$state" = ACTIVE ] || return 0
    if [ -n "$dry_run" ]; then
      tpu_vm status
      lines="worker assumed: ended 0"
    else
      lines=$(tpu_vm status </dev/null) || lines="no answer"
    fi
    # One worker may end a moment before the others, and TPUs that are taken away count as active for a while.
    if [[ $lines == *": running "* ]]; then
      trouble=0
    else
      judge "$lines"
      [ "$outcome" != 0 ] || return 0
      trouble=$((trouble + 1))
      note "$name is ACTIVE, but the training does not run (look $trouble of $PATIENCE): $(tail -n 1 <<<"$lines")"
      [ "$trouble" -lt "$PATIENCE" ] || return 0
    fi
    sleep "$POLL"
  done
}

prepare() {
  tpu_vm wait && tpu_vm sync && tpu_vm setup && tpu_vm run -- "${TRAINING[@]}"
}

# Makes the TPUs train, and watches. A step that fails because the TPUs were taken away shows in the state that watch sees.
attend() {
  local lines="" prepared=1
  if [ -n "$adopt" ]; then
    lines=$(tpu_vm status </dev/null) || true
    [ -z "$dry_run" ] || echo "$lines"
  fi
  if [[ $lines != *": running "* ]]; then
    prepare || prepared=$?
  fi
  watch
}

train() {
  local retries=0 pause=60 state outcome
  trap 'note "interrupted: the TPUs and the training go on. Watch again with --adopt, or: $PROGRAM delete"; exit 130' INT
  [ -n "$adopt" ] || create
  while :; do
    wait_until_active
    outcome=lost
    [ "$state" != ACTIVE ] || attend
    case $outcome in
      lost) note "$name is $state" ;;
      stopped) note "the training saved and stopped before its last step, and $name is still $state: it goes on there" ;;
      *) break ;;
    esac
    [ "$retries" -lt "$max_retries" ] ||
      fail 1 "$name was lost, or its training stopped, $((retries + 1)) times, --max_retries=$max_retries; the same command with --adopt goes on"
    [ "$outcome" = stopped ] || delete
    sleep "$pause"
    pause=$((pause < 960 ? 2 * pause : 1800))
    retries=$((retries + 1))
    adopt=""
    [ "$outcome" = stopped ] || create
  done
  if [ "$outcome" -ne 0 ]; then
    fail "$outcome" "the training ended with status $outcome; the TPUs are kept and cost money; $PROGRAM {delete} ends that, launch/tpu_vm.sh logs shows why"
  fi
  [ -n "$dry_run" ] || note "the training has finished"
  delete
}

case $command in
  run)
    need type v5p-128 version v2-alpha-tpuv5
    check_type "$type"
    need_training
    [[ $(training_flag workdir) == gs://?* ]] ||
      usage "--workdir=$(training_flag workdir) would be lost with the TPUs; spot training needs --workdir=gs://BUCKET/RUN"
    train
    ;;
  status)
    state_of_resource state
    [ -n "$dry_run" ] || echo "$name: queued resource $state"
    [ "$state" != ACTIVE ] || tpu_vm status
    ;;
  delete) delete ;;
esac
