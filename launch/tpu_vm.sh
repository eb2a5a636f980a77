#!/usr/bin/env bash
# A TPU VM or slice, by gcloud, all workers at once: launch/tpu_vm.sh COMMAND --name=… --zone=… --project=… [--dry_run]
#   create --type=v5p-128 --version=v2-alpha-tpuv5 [--spot] [--network=…] [--subnetwork=…]
#   wait [--timeout=1800]     until it is ready and every worker answers (seconds)
#   sync                      copy the repository's tracked files, as they are now, to ~/llada_jax of every worker
#   setup                     make the environment on every worker
#   run -- --config=… --workdir=gs://… [training flags]      start the training on every worker; it goes on without this machine
#   logs [--worker=0] [--lines=50]      follow the log of one worker
#   status                    state of the TPU, and of the training on every worker
#   stop [--grace=120]        SIGTERM to the training, which saves; waits for its end (seconds)
#   delete [--yes]            asks for the name first
# In this order: create, wait, sync, setup, run. The command of `run` also resumes. queued.sh does all of it on spot capacity.
# Where an ssh-agent runs, gcloud copies to several workers only with its key in it: ssh-add ~/.ssh/google_compute_engine
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

name="" zone="" project="" type="" version="" network="" subnetwork="" spot=""
worker=0 lines=50 timeout=1800 grace=120
COMMANDS=create,wait,sync,setup,run,logs,status,stop,delete
command=${1:-}
[[ $command =~ ^[a-z]+$ && ,$COMMANDS, == *",$command,"* ]] || usage "name a command first: $PROGRAM {$COMMANDS} --name=… --zone=… --project=…"
shift
parse "name zone project type version network subnetwork worker lines timeout grace" "spot yes" "$@"
need name my-tpu zone us-east5-a project my-project
need_number lines 0
need_number timeout 0
need_number grace 1
[[ $worker =~ ^([0-9]+|all)$ ]] || usage "--worker=$worker is neither a number nor all"
need_tools gcloud
WHERE=("$name" --zone="$zone" --project="$project")

on_workers() { # RUNNER WORKER COMMAND…: a command line on a worker, or on all of them at once
  "$1" gcloud compute tpus tpu-vm ssh "${WHERE[@]}" --worker="$2" --quiet --command="$(quoted "${@:3}")"
}

state_of_node() { # VARIABLE
  ask "$1" READY gcloud compute tpus tpu-vm describe "${WHERE[@]}" --format="value(state)"
}

wait_until_ready() {
  local waited state
  for ((waited = 0; ; waited += 15)); do
    state_of_node state
    case $state in
      READY) break ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) ;;
      *) fail 1 "$name is $state and will not become ready" ;;
    esac
    [ "$waited" -lt "$timeout" ] || fail 1 "$name is still $state after --timeout=$timeout s"
    sleep 15
  done
  on_workers run_retrying 0 true # alone and first: it makes the keys that the others then share
  on_workers run_retrying all true
}

# The tracked files as they are in this folder. What the last sync brought is removed first, so that no deleted file stays.
send() {
  local archive=llada_jax.next.tar.gz path untracked files=()
  while IFS= read -r -d '' path; do
    if [ -e "$ROOT/$path" ] || [ -L "$ROOT/$path" ]; then files+=("$path"); fi
  done < <(git -C "$ROOT" ls-files -z)
  [ ${#files[@]} -gt 0 ] || fail 1 "git lists no files in $ROOT"
  untracked=$(git -C "$ROOT" ls-files --others --exclude-standard | wc -l)
  [ "$untracked" -eq 0 ] || note "$((untracked)) untracked files are not sent (git status lists them; git add includes them)"
  folder=/tmp/llada_jax.XXXXXX # not local, for the trap
  if [ -z "$dry_run" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf -- "$folder"' EXIT
    printf '%s\0' "${files[@]}" | tar -C "$ROOT" --null -T - -czf "$folder/$archive"
  fi
  run_retrying gcloud compute tpus tpu-vm scp "$folder/$archive" "$name:$archive" "${WHERE[@]:1}" --worker=all --quiet
  run_retrying gcloud compute tpus tpu-vm ssh "${WHERE[@]}" --worker=all --quiet --command="set -e; mkdir -p llada_jax; cd llada_jax; \
if [ -e ../llada_jax.tar.gz ]; then tar -tzf ../llada_jax.tar.gz | xargs -d '\\n' rm -f --; fi; \
tar -xzf ../$archive; cp ../$archive ../llada_jax.tar.gz"
}

case $command in
  create)
    need type v5p-128 version v2-alpha-tpuv5
    check_type "$type"
    run gcloud compute tpus tpu-vm create "${WHERE[@]}" --accelerator-type="$type" --version="$version" ${spot:+--spot} \
      ${network:+--network="$network"} ${subnetwork:+--subnetwork="$subnetwork"}
    ;;
  wait) wait_until_ready ;;
  sync) send ;;
  setup) on_workers run all bash llada_jax/launch/worker.sh setup ;;
  run)
    need_training
    case $(training_flag workdir) in
      gs://*) ;;
      *) note "--workdir=$(training_flag workdir) lies on each worker's own disk: it is lost with the TPU, and no slice of several workers can save there" ;;
    esac
    on_workers run all bash llada_jax/launch/worker.sh start -- "${TRAINING[@]}"
    ;;
  logs) on_workers run "$worker" bash llada_jax/launch/worker.sh logs "$lines" ;;
  status)
    state_of_node state
    [ -n "$dry_run" ] || echo "$name: $state"
    [ "$state" != READY ] || on_workers run all bash llada_jax/launch/worker.sh status
    ;;
  stop) on_workers run all bash llada_jax/launch/worker.sh stop "$grace" ;;
  delete)
    confirm "the TPU VM $name in $zone of $project with all its disks" "$name"
    run gcloud compute tpus tpu-vm delete "${WHERE[@]}" --quiet
    ;;
esac
