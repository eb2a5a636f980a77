#!/usr/bin/env bash
# Before a run on a pod: launch/preflight.sh --zone=… --project=… --type=v5p-128 [--version=…] [--context=…] [--dry_run] -- --config=… --workdir=gs://…
# A line PASS or FAIL for each check: tools, login, project, the TPU API, zone, type and runtime version as the cloud spells them,
# the bucket (writes and removes one small object), the git tree, and the training command up to its first step, with as many CPU
# devices as the type has TPU devices and an empty run folder of its own; with --context, kubectl and JobSet in that cluster too.
# Exit status 1 if a check failed.
# It does not ask for quota: gcloud beta quotas info list --service=tpu.googleapis.com --project=… shows it.
set -uo pipefail # not -e: a failed check is counted, and the next one is made
# shellcheck source=/dev/null
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

zone="" project="" type="" version="" context="" failed=0
parse "zone project type version context" "" "$@"
need zone us-east5-a project my-project type v5p-128
need_training
check_type "$type"
workdir=$(training_flag workdir)
[[ $workdir =~ ^gs://[^/]+ ]] || usage "--workdir=$workdir is not in a bucket: name --workdir=gs://BUCKET/RUN"
bucket=${BASH_REMATCH[0]}

result() { # PASS|FAIL NAME WORDS…
  echo "$1 ${*:2}"
  [ "$1" = PASS ] || failed=1
}

# check NAME REMEDY COMMAND… passes when the command does; its error line, or its last one, is said when it fails.
check() {
  local output
  if [ -n "$dry_run" ]; then
    quoted "${@:3}"
  elif output=$("${@:3}" 2>&1 </dev/null); then
    result PASS "$1"
  else
    result FAIL "$1: $(grep -i -m 1 '^error' <<<"$output" || tail -n 1 <<<"${output:-no message}"); $2"
    return 1
  fi
}

# Passes when the command also prints something.
check_output() {
  if [ -n "$dry_run" ]; then
    quoted "${@:3}"
  elif [ -n "$("${@:3}" 2>/dev/null </dev/null)" ]; then
    result PASS "$1"
  else
    result FAIL "$1: $2"
  fi
}

tools=(gcloud git tar ssh scp)
[ -z "$context" ] || tools+=(kubectl)
missing=""
for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || missing+=" $tool"; done
if [ -n "$dry_run" ]; then :; elif [ -z "$missing" ]; then result PASS "tools: ${tools[*]}"; else result FAIL "tools: not on PATH:$missing"; fi

folder=/tmp/llada_jax.XXXXXX
if [ -z "$dry_run" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf -- "$folder"' EXIT
  echo "written by launch/preflight.sh; may be deleted" >"$folder/probe"
fi

if [ -n "$dry_run" ] || command -v gcloud >/dev/null; then
  at=(--zone="$zone" --project="$project")
  check_output "login" "no active account; run: gcloud auth login" gcloud auth list --filter=status:ACTIVE --format="value(account)"
  check "project $project" "see: gcloud projects list" gcloud projects describe "$project"
  check_output "TPU API" "not enabled; run: gcloud services enable tpu.googleapis.com --project=$project" \
    gcloud services list --enabled --filter=config.name=tpu.googleapis.com --format="value(config.name)" --project="$project"
  check "zone $zone" "see: gcloud compute tpus locations list --project=$project" gcloud compute tpus locations describe "$zone" --project="$project"
  check "type $type" "see: gcloud compute tpus accelerator-types list --zone=$zone" gcloud compute tpus accelerator-types describe "$type" "${at[@]}"
  [ -z "$version" ] ||
    check "version $version" "see: gcloud compute tpus tpu-vm versions list --zone=$zone" gcloud compute tpus tpu-vm versions describe "$version" "${at[@]}"

  probe=$bucket/llada_jax-preflight-$$-$RANDOM
  [ -z "$dry_run" ] || probe=$bucket/llada_jax-preflight
  check "bucket $bucket can be written" "make it, or ask for the role Storage Object User" gcloud storage cp "$folder/probe" "$probe" &&
    check "bucket $bucket: own object removed" "remove it: gcloud storage rm $probe" gcloud storage rm "$probe"
fi
if [ -n "$context" ]; then
  check "JobSet in $context" "install JobSet in the cluster" kubectl --context="$context" get customresourcedefinition jobsets.jobset.x-k8s.io
fi

if [ -n "$dry_run" ]; then
  quoted git -C "$ROOT" status --porcelain
elif ! changes=$(git -C "$ROOT" status --porcelain 2>&1); then
  result FAIL "git tree: $(tail -n 1 <<<"$changes")"
elif [ -z "$changes" ]; then
  result PASS "git tree: clean at $(git -C "$ROOT" rev-parse --short HEAD)"
else
  result FAIL "git tree: $(($(wc -l <<<"$changes"))) files differ from the commit (untracked ones are not sent): $(head -n 5 <<<"$changes" | paste -sd, -)"
fi

number=${type##*-}
case $type in v4-* | v5p-*) number=$((number / 2)) ;; esac # their names count TensorCores, two a chip, and jax sees chips
python=${LLADA_PYTHON:-$ROOT/.venv/bin/python}
cd -- "$ROOT" || exit 1
check "training command on $number devices" "mend it, or make the environment: bash launch/demo.sh" \
  env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$number" "$python" -m llada_jax.train "${TRAINING[@]}" --workdir="$folder/run" --dry_run
exit "$failed"
