#!/usr/bin/env bash
# TPU slices of a GKE cluster, by JobSet: launch/gke.sh COMMAND --name=… --context=… --namespace=… [--dry_run]
#   submit --image=… --accelerator=tpu-v5p-slice --topology=4x4x4 -- --config=… --workdir=gs://… [training flags]
#         --slices=1            of this topology each
#         --chips_per_host=4    of the machine type: 4, but 8 or 1 for some of one host
#         --max_restarts=10     after a lost host or slice, or a training that saved and stopped early; it then resumes
#   render …            print the JobSet that submit would send
#   status              of the JobSet and its pods
#   logs [--all]        follow process 0, or all processes
#   delete [--yes]      asks for the name first; the training gets SIGTERM and 120 s to save
# --context is one of `kubectl config get-contexts`. The image holds this repository in /llada_jax with its environment; made in a
# clone without .venv:      FROM python:3.12
#                           COPY . /llada_jax
#                           RUN bash /llada_jax/launch/worker.sh setup
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

name="" context="" namespace="" image="" accelerator="" topology="" all=""
slices=1 chips_per_host=4 max_restarts=10
command=${1:-}
[[ $command =~ ^(submit|render|status|logs|delete)$ ]] ||
  usage "name a command first: $PROGRAM {submit,render,status,logs,delete} --name=… --context=… --namespace=…"
shift
parse "name context namespace image accelerator topology slices chips_per_host max_restarts" "all yes" "$@"
need name my-run context my-cluster namespace default
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || usage "--name=$name: 1 to 40 small letters, digits and -, from a letter to a letter or digit"
need_number slices 1
need_number chips_per_host 1
need_number max_restarts 0
KUBECTL=(kubectl --context="$context" --namespace="$namespace")

# A string of YAML in double quotes, in which Kubernetes replaces no $(…).
yaml_string() {
  local text=$1
  [[ ! $text =~ [[:cntrl:]] ]] || usage "a flag of the training holds a control character: $(quoted "$text")"
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//\$/\$\$}
  printf '"%s"' "$text"
}

# Prints jobset.yaml with its variables replaced. ARGUMENTS comes last: no other value can hold ${…}.
render() {
  local text value variable hosts=1 size arguments="" argument
  need image REGION-docker.pkg.dev/PROJECT/REPOSITORY/llada_jax accelerator tpu-v5p-slice topology 4x4x4
  need_training
  [[ $(training_flag workdir) == gs://?* ]] || usage "--workdir=$(training_flag workdir) would be lost with the pod; name --workdir=gs://BUCKET/RUN"
  [[ $namespace =~ ^[a-z0-9-]+$ ]] || usage "--namespace=$namespace is no name of Kubernetes"
  [[ $image =~ ^[A-Za-z0-9./:@_-]+$ ]] || usage "--image=$image is no name of an image"
  [[ $accelerator =~ ^[a-z0-9-]+$ ]] || usage "--accelerator=$accelerator is none; for example tpu-v5p-slice, tpu-v5-lite-podslice, tpu-v6e-slice"
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || usage "--topology=$topology is not like 4x4x4 or 16x16"
  for size in ${topology//x/ }; do hosts=$((hosts * size)); done
  [ $((hosts % chips_per_host)) -eq 0 ] || usage "--topology=$topology has $hosts chips, not a multiple of --chips_per_host=$chips_per_host"
  hosts=$((hosts / chips_per_host))
  for argument in "${TRAINING[@]}"; do arguments+=", $(yaml_string "$argument")"; done

  text=$(grep -v '^#' "$ROOT/launch/jobset.yaml")
  for value in NAME="$name" NAMESPACE="$namespace" MAX_RESTARTS="$max_restarts" SLICES="$slices" HOSTS="$hosts" \
    ACCELERATOR="$accelerator" TOPOLOGY="$topology" IMAGE="$image" CHIPS="$chips_per_host" ARGUMENTS="[${arguments:2}]"; do
    variable="\${${value%%=*}}"
    text=${text//"$variable"/${value#*=}}
  done
  printf '%s\n' "$text"
}

case $command in
  render) render ;;
  submit)
    manifest=$(render)
    need_tools kubectl
    run "${KUBECTL[@]}" create --filename=- <<<"$manifest"
    ;;
  status)
    need_tools kubectl
    run "${KUBECTL[@]}" get jobset "$name"
    run "${KUBECTL[@]}" get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
    ;;
  logs)
    need_tools kubectl
    selector=jobset.sigs.k8s.io/jobset-name=$name
    [ -n "$all" ] || selector+=,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
    run "${KUBECTL[@]}" logs --follow --prefix --tail=50 --max-log-requests=1024 --selector="$selector"
    ;;
  delete)
    need_tools kubectl
    confirm "the JobSet $name in namespace $namespace of $context" "$name"
    run "${KUBECTL[@]}" delete jobset "$name"
    ;;
esac
