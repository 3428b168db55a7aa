#!/usr/bin/env bash
# Brings the CPU stack up on a real Docker engine, uses it, kills parts of it, and takes it down again:
#
#     deploy/verify_compose.sh                 # with the engine of this machine
#     deploy/verify_compose.sh --standins      # as root on Debian 12, without an engine and without image registries
#
# --standins starts an engine of its own in a scratch folder and builds stand-ins, from Debian's packages, for the upstream images
# (python, prometheus); Grafana is left out then, and every expression of its dashboard is asked of the Prometheus that runs.
# Writes what it saw to deploy/verify_compose.md. VERIFY_SCRATCH=FOLDER keeps the stand-ins for a second run.
set -euo pipefail
cd "$(dirname "$0")/.."

STANDINS=no
[ "${1:-}" = --standins ] && STANDINS=yes
SCRATCH=${VERIFY_SCRATCH:-$(mktemp -d /tmp/distill-verify.XXXXXX)}
KEEP_SCRATCH=${VERIFY_SCRATCH:+yes}
mkdir -p "$SCRATCH"
SCRATCH=$(cd "$SCRATCH" && pwd)
PROJECT=distill-verify
RUNS=$SCRATCH/runs
JOURNAL=$RUNS/verify/train/metrics.jsonl
FILES=(-f docker-compose.yml -f deploy/compose.cpu.yml)
SERVICES=(secrets teacher triton gateway ray-head ray-worker trainer tensorboard prometheus)
[ "$STANDINS" = no ] && SERVICES+=(grafana)
GATEWAY=http://127.0.0.1:18080
PROMETHEUS=http://127.0.0.1:19090
SUMMARY=$SCRATCH/summary
: > "$SUMMARY"

# A run of minutes: the shipped images, one epoch of pretraining, two of distillation, checkpoints often enough to be killed between.
export DISTILL_RUNS=$RUNS DISTILL_RUN_DIR=runs/verify DISTILL_GATEWAY_PORT=18080 DISTILL_PROMETHEUS_PORT=19090 DISTILL_TENSORBOARD_PORT=16006
export DISTILL_RAY_PORT=18265 DISTILL_GRAFANA_PORT=13000 DISTILL_WORKER_CPUS=2 DISTILL_SHM_SIZE=1gb DISTILL_UID=1000
export DISTILL_OVERRIDES="pretrain.epochs=1 finetune.epochs=5 train.epochs=${VERIFY_EPOCHS:-3} train.num_views=2 train.control=false train.checkpoint_every_steps=50"

say() { printf '%6ss  %s\n' "$SECONDS" "$*"; }
saw() { say "$*"; printf '| %s s | %s |\n' "$SECONDS" "$*" >> "$SUMMARY"; }
fail() {
  say "FAILED: $*"
  stack ps -a || true
  stack logs --tail 40 || true
  exit 1
}
# Reads to the end: `grep -q` would break the pipe of what still writes.
holds() { grep -- "$1" > /dev/null; }
stack() { docker compose -p "$PROJECT" "${FILES[@]}" "$@"; }
# wait_for SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" > /dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || fail "$what did not come"
    sleep 1
  done
}
status_of() { curl -s -o "$SCRATCH/answer" -w '%{http_code}' -m 20 "$@"; }
is_status() { [ "$(status_of "${@:2}")" = "$1" ]; }
health() { docker inspect -f '{{.State.Health.Status}}' "$(stack ps -q "$1")"; }
is_healthy() { [ "$(health "$1")" = healthy ]; }
# A crash, not a stop: Docker does not restart what `docker kill` has ended.
crash() { kill -9 "$(docker inspect -f '{{.State.Pid}}' "$(stack ps -q "$1")")"; }
restarts() { docker inspect -f '{{.RestartCount}}' "$(stack ps -q "$1")"; }
query() { curl -s -m 10 --get --data-urlencode "query=$1" "$PROMETHEUS/api/v1/query"; }
has_result() { query "$1" | holds '"value":\['; }
steps_done() { grep -c '"kind": *"step"' "$JOURNAL" 2> /dev/null || true; }
trains() { [ "$(steps_done)" -gt "${1:-0}" ]; }
# `step` of the journal's rows that hold $1, from row $2 on: the next step of each checkpoint, the first one of each training process.
steps_of() { tail -n "+${2:-1}" "$JOURNAL" | grep -- "$1" | grep -o '"step": *[0-9]*' | grep -o '[0-9]*$'; }
KEPT='"kind": *"checkpoint"' BEGUN='"images_per_s": *null'
has_kept() { [ "$(steps_of "$KEPT" | wc -l)" -ge "$1" ]; }

clean_up() {
  local code=$?
  stack down --volumes --timeout 20 > /dev/null 2>&1 || true
  if [ -n "${ENGINE_PID:-}" ]; then
    kill "$ENGINE_PID" && while kill -0 "$ENGINE_PID" 2> /dev/null; do sleep 0.5; done
    umount "$SCRATCH/engine/run/netns/default" 2> /dev/null || true
  fi
  [ -n "$KEEP_SCRATCH" ] || rm -rf "$SCRATCH"
  exit "$code"
}
trap clean_up EXIT

start_engine() {
  command -v dockerd debootstrap > /dev/null || apt-get -qq install -y --no-install-recommends docker.io debootstrap > /dev/null
  local engine=$SCRATCH/engine
  mkdir -p "$engine"
  # Flags that leave the network of this machine alone.
  setsid nohup dockerd --data-root "$engine/var" --exec-root "$engine/run" --pidfile "$engine/dockerd.pid" -H "unix://$engine/docker.sock" \
    --storage-driver overlay2 --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \
    > "$engine/dockerd.log" 2>&1 < /dev/null &
  ENGINE_PID=$!
  export DOCKER_HOST=unix://$engine/docker.sock
  wait_for 30 "the engine" docker version
}

# The images that the Dockerfiles and Compose name, made of Debian's packages; certificates and pip's settings of this machine go in, so that
# our Dockerfiles build as they are.
build_standins() {
  local root=$SCRATCH/rootfs
  export PROMETHEUS_IMAGE=standin/prometheus:2.42 TORCH_INDEX= DOCKER_BUILDKIT=0 # Debian has no buildx
  if docker image inspect python:3.11-slim-bookworm "$PROMETHEUS_IMAGE" > /dev/null 2>&1; then return; fi
  if [ ! -e "$root/.whole" ]; then
    rm -rf "$root"
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,libpython3.11,ca-certificates,wget bookworm "$root" > "$SCRATCH/debootstrap.log"
    rm -f "$root/usr/lib/python3.11/EXTERNALLY-MANAGED"
    for name in python python3; do ln -sf /usr/bin/python3 "$root/usr/local/bin/$name"; done
    ln -sf /usr/bin/pip3 "$root/usr/local/bin/pip"
    cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2> /dev/null || true
    chroot "$root" update-ca-certificates > /dev/null
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntimeout = 180\n' > "$root/etc/pip.conf"
    if [ -n "${PIP_FIND_LINKS:-}" ]; then # a folder of wheels beside the package index
      mkdir -p "$root$PIP_FIND_LINKS"
      cp "$PIP_FIND_LINKS"/*.whl "$root$PIP_FIND_LINKS/"
      printf 'find-links = %s\n' "$PIP_FIND_LINKS" >> "$root/etc/pip.conf"
    fi
    touch "$root/.whole"
  fi
  tar -C "$root" --numeric-owner -c . | docker import --change 'CMD ["python3"]' --change 'ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt' \
    --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' - python:3.11-slim-bookworm > /dev/null
  printf 'FROM python:3.11-slim-bookworm\nRUN apt-get update && apt-get install -y --no-install-recommends prometheus\nRUN install -d -g 0 -m 2770 /prometheus\nENTRYPOINT ["prometheus"]\n' \
    | docker build --network=host -q -t "$PROMETHEUS_IMAGE" - > /dev/null
}

if [ "$STANDINS" = yes ]; then
  start_engine
  build_standins
  cat > "$SCRATCH/network.yml" << 'Y'
# The private engine's containers reach the package index only through the host's network, while they are built.
services:
  secrets: {build: {network: host}}
  teacher: {build: {network: host}}
  triton: {build: {network: host}}
  tensorboard: {build: {network: host}}
Y
  FILES+=(-f "$SCRATCH/network.yml")
fi
saw "engine $(docker version -f '{{.Server.Version}}'), Compose $(docker compose version --short)"

rm -rf "$RUNS"
install -d -m 2775 "$RUNS"
chown "$DISTILL_UID:0" "$RUNS" 2> /dev/null || true
for service in secrets teacher triton tensorboard; do stack build -q "$service" > /dev/null 2> "$SCRATCH/build.log" || fail "$service does not build: $(tail -5 "$SCRATCH/build.log")"; done
sizes() { docker images --format '{{.Repository}} {{.Size}}' | grep '^distill-' | sort -u | paste -sd, | sed 's/,/, /g'; }
saw "images built: $(sizes)"

stack up -d "${SERVICES[@]}" > "$SCRATCH/up.log" 2>&1 || fail "the stack did not come up: $(tail -3 "$SCRATCH/up.log")"
saw "stack is up; the teacher was made, Triton serves it and a label came out of it"

# --- REST ---
KEY=$(stack run --rm -T keys add verify 2> "$SCRATCH/keys.log") || fail "no key: $(tail -1 "$SCRATCH/keys.log")"
mkdir -p "$SCRATCH/images"
tar -xzf data/fashion-mnist/test-000000.tar.gz -C "$SCRATCH/images"
IMAGE=$(find "$SCRATCH/images" -name '*.png' -print -quit)
[ -n "$IMAGE" ] || fail "no test image"
ask() { status_of --data-binary "@$IMAGE" -H 'Content-Type: image/png' "$@" "$GATEWAY/v1/soft-labels?temperature=2&top_k=3&names=true"; }
[ "$(ask)" = 401 ] || fail "a request without a key was answered"
answers() { [ "$(ask -H "Authorization: Bearer $KEY")" = 200 ]; }
wait_for 30 "a soft label" answers
saw "REST: 401 without a key; with one \`$(grep -o '"class_names":\[[^]]*\]' "$SCRATCH/answer")\`"
[ "$(status_of "$GATEWAY/metrics")" = 401 ] || fail "the gateway's metrics were given without a key"

# --- the run, with Triton, the trainer and Ray's worker killed on the way ---
wait_for 600 "a first step of training" trains
saw "students are trained, as a job on Ray"
before=$(restarts triton)
crash triton
saw "kill -9 of Triton"
wait_for 30 "503 of the gateway" is_status 503 "$GATEWAY/readyz"
wait_for 120 "Triton's return" is_healthy triton
wait_for 60 "a soft label after Triton's return" answers
[ "$(restarts triton)" -gt "$before" ] || fail "Triton was not restarted"
at=$(steps_done)
wait_for 300 "steps after Triton's return" trains "$at"
saw "Triton is back; the gateway said 503 meanwhile and gives labels again; training goes on after step row $at"

crash trainer
saw "kill -9 of the trainer, which follows the job"
follows() { stack logs trainer 2>&1 | holds 'runs this command already; it is followed'; }
wait_for 120 "the trainer's return" follows
saw "the trainer is back and follows the same job; no second one was started"

wait_for 300 "a checkpoint that is whole" has_kept 2 # the second waits until the first is written
at=$(wc -l < "$JOURNAL")
before=$(steps_of '"kind": *"step"' | tail -n 1)
crash ray-worker
saw "kill -9 of Ray's worker, after step $before"
wait_for 300 "Ray's worker" is_healthy ray-worker
wait_for 400 "a step of a new training process" steps_of "$BEGUN" $((at + 1))
first=$(steps_of "$BEGUN" $((at + 1)) | sed -n 1p)
steps_of "$KEPT" | holds "^$((first - 1))\$" || fail "training goes on with step $first, and no checkpoint was written after step $((first - 1))"
saw "Ray's worker is back; training goes on with step $first, the next one of a checkpoint"

for expression in 'up{job="triton"} == 1' 'up{job="gateway"} == 1' 'up{job="ray"} == 1' nv_inference_request_success distill_gateway_requests_total \
  distill_images_total 'distill_labels_total{source="teacher"}' distill_student_loss; do
  wait_for 60 "$expression in Prometheus" has_result "$expression"
done
saw "Prometheus has Triton, the gateway (by its key), Ray and the run"
asked=0 filled=0
while IFS= read -r expression; do
  query "$expression" > "$SCRATCH/answer"
  holds '"status":"success"' < "$SCRATCH/answer" || fail "the dashboard's expression is refused: $expression"
  asked=$((asked + 1))
  holds '"result":\[\]' < "$SCRATCH/answer" || filled=$((filled + 1)) # of a metric that nobody exposes Prometheus answers success, too
done < <(python3 -c '
import json, re, sys
variables = {"__rate_interval": "5m", "__interval": "1m", "__range": "1h"}
def panels(items):
    for panel in items:
        yield panel
        yield from panels(panel.get("panels", []))
board = json.load(open("deploy/grafana/dashboards/distill.json"))
for variable in board.get("templating", {}).get("list", []):
    current = variable.get("current", {}).get("value") or variable.get("query", "")
    variables[variable["name"]] = ".*" if current in ("$__all", ["$__all"], "") else str(current)
for panel in panels(board["panels"]):
    for target in panel.get("targets", []):
        print(" ".join(re.sub(r"\$\{?(\w+)(:\w+)?\}?", lambda m: variables.get(m[1], m[0]), target["expr"]).split()))
')
saw "$asked expressions of the dashboard accepted by this Prometheus; $filled of them have a result"
status_of "http://127.0.0.1:16006/data/runs" > /dev/null
grep -q verify "$SCRATCH/answer" || fail "TensorBoard shows no run"
[ "$STANDINS" = yes ] || wait_for 60 Grafana is_status 200 "http://127.0.0.1:13000/api/health"
saw "TensorBoard shows the run"

ended() { [ "$(docker inspect -f '{{.State.Status}}' "$(stack ps -aq trainer)")" = exited ]; }
wait_for 1800 "the end of the run" ended
[ "$(docker inspect -f '{{.State.ExitCode}}' "$(stack ps -aq trainer)")" = 0 ] || fail "the run failed"
students=$(find "$RUNS/verify/export-student" -name '*.fp32.onnx' | wc -l)
[ "$students" = 2 ] || fail "$students students instead of 2"
[ -s "$RUNS/verify/report/report.html" ] || fail "no report"
saw "the run is done: $students students with edge files and a report in ./runs"

# --- two workers; a graceful stop in the middle of a longer run, which writes no checkpoint of its own accord ---
export DISTILL_OVERRIDES="$DISTILL_OVERRIDES train.epochs=40 train.checkpoint_every_steps=1000000 ray.num_workers=2"
rm -f "$JOURNAL"
stack up -d --no-deps --no-recreate --scale ray-worker=2 ray-worker > "$SCRATCH/up2.log" 2>&1
wait_for 120 "a second Ray worker in Prometheus" has_result 'count(up{job="ray"} == 1) == 3'
stack up -d --no-deps --scale ray-worker=2 trainer >> "$SCRATCH/up2.log" 2>&1
wait_for 600 "a step of the longer run" trains 3
trainers() { for id in $(stack ps -q ray-worker); do docker top "$id" -eo pid,cmd; done | grep -c 'ray::.*TrainWorker'; }
two_train() { [ "$(trainers)" = 2 ]; }
wait_for 60 "a second training worker" two_train
saw "--scale ray-worker=2: both are in Prometheus, and a run trains on two workers"
touch "$SCRATCH/before-the-stop"
stack stop trainer > /dev/null 2>&1
code=$(docker inspect -f '{{.State.ExitCode}}' "$(stack ps -aq trainer)")
[ "$code" = 143 ] || fail "the trainer that was stopped ended with $code, not 143"
written=$(find "$RUNS/verify/train" -newer "$SCRATCH/before-the-stop" -name '*.safetensors' | wc -l)
[ "$written" -gt 0 ] || fail "no checkpoint was written at the stop"
saw "stopped in the middle of a longer run: exit code 143, and a checkpoint written after the signal"

stack down --volumes --timeout 60 > /dev/null 2>&1
left=$(docker ps -aq --filter "label=com.docker.compose.project=$PROJECT"; docker volume ls -q --filter "label=com.docker.compose.project=$PROJECT"; docker network ls -q --filter "label=com.docker.compose.project=$PROJECT")
[ -z "$left" ] || fail "left behind: $left"
saw "taken down: no container, volume or network is left"

{
  echo "# What deploy/verify_compose.sh saw"
  echo
  echo "Written by the script; do not edit. $(date -u +%F), commit $(git rev-parse --short HEAD)$(git diff --quiet HEAD -- . ':!deploy/verify_compose.md' || echo ' with changes'), $(nproc) cores."
  [ "$STANDINS" = yes ] && echo "Upstream images were stand-ins made of Debian's packages (python, prometheus $(docker run --rm --entrypoint prometheus "$PROMETHEUS_IMAGE" --version 2>&1 | grep -om1 'version [0-9.]*')); Grafana did not run; Triton is the one of deploy/docker/triton-cpu.Dockerfile."
  echo
  echo "| after | |"
  echo "|--:|---|"
  cat "$SUMMARY"
} > deploy/verify_compose.md
say "all of it; deploy/verify_compose.md"
